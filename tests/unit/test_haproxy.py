"""What is made of the configuration that this Ray writes for HAProxy."""

import re

from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from cluster import haproxy


def test_every_listener_is_on_loopback_and_half_sent_headers_end():
    filled = re.sub(r"{{ config\.\w*host }}", "127.0.0.1", HAPROXY_CONFIG_TEMPLATE)  # as the endpoint is told
    mended = haproxy.mended(re.sub(r"{{ .*? }}", "8404", filled))
    binds = re.findall(r"^\s*bind (\S+)", mended, re.MULTILINE)
    assert binds == ["127.0.0.1:8404"] * 4
    assert mended.count("timeout http-request 10s") == 1


def test_two_endpoints_of_one_machine_share_neither_port_nor_file(tmp_path):
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(haproxy.environment(tmp_path / name))
    shared = {name for name in made[0] if made[0][name] == made[1][name]}
    assert shared == {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"}
