"""The bill of materials of a bundle is valid CycloneDX, complete, and names no path."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from scalp_core.bundles.bundle import BOM_FILE, open_bundle, read_spec, save_bundle, sha256
from scalp_core.bundles.contract import InitialWeights
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.ml_bom import make_ml_bom
from scalp_core.bundles.registry import copy_bundle
from tests.support import bills

VAL = {"n": 90, "qwk": 0.8123, "top1": 0.7, "auroc": None, "intervals": {"qwk": {"low": 0.75, "high": 0.86}}}


def check(bom):
    assert bills.errors(bom) == []
    return bom["metadata"]["component"]


def changed(bundle, weights, **training):
    spec = read_spec(str(bundle))
    values = training | {"initial_weights": weights}
    return spec.model_copy(
        update={"training": spec.training.model_copy(update=values), "metrics": {"val": VAL}}
    )


@pytest.mark.medium
def test_the_command_prints_a_valid_bill_with_the_files_of_the_bundle(bundle):
    found = CliRunner().invoke(app, ["models", "bom", str(bundle)], catch_exceptions=False)
    model = check(json.loads(found.stdout))
    files = {each["name"]: each["hashes"][0]["content"] for each in model["components"]}
    assert files == {name: sha256((bundle / name).read_bytes()) for name in files}
    assert {"model.safetensors", "model.xml", "model.bin"} == files.keys()
    spec = read_spec(str(bundle))
    assert json.loads((bundle / BOM_FILE).read_bytes()) == json.loads(found.stdout)
    assert model["version"] == spec.model_version
    assert "pedigree" not in model
    libraries = {each["name"]: each["version"] for each in json.loads(found.stdout)["components"][1:]}
    assert libraries == spec.versions
    assert str(bundle) not in found.stdout


def test_the_same_contract_makes_the_same_bill(bundle):
    spec = read_spec(str(bundle))
    assert make_ml_bom(spec) == make_ml_bom(spec)
    other = spec.model_copy(update={"temperature": 9.0})
    assert make_ml_bom(other)["serialNumber"] != make_ml_bom(spec)["serialNumber"]


def test_the_bundle_has_the_bill_of_its_contract_after_each_change(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    first = read_spec(str(copy))
    (copy / BOM_FILE).unlink()  # as in a bundle of an older version
    assert load_bundle(str(copy)).spec == first
    bills = []
    for temperature in (9.0, 8.0, 9.0):
        spec = first.model_copy(update={"temperature": temperature})
        save_bundle(str(copy), spec, {})
        bills.append((copy / BOM_FILE).read_bytes())
        assert json.loads(bills[-1]) == make_ml_bom(spec)
        assert spec.fingerprint in bills[-1].decode()
    assert bills[0] == bills[2] != bills[1]


def test_a_copy_of_a_bundle_has_the_bill_of_its_contract(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    for stale in (b"of a change that was stopped", None):
        (copy / BOM_FILE).unlink()
        if stale is not None:
            (copy / BOM_FILE).write_bytes(stale)
        copy_bundle(open_bundle(str(copy)), str(tmp_path / f"copied-{stale is None}"))
        made = (tmp_path / f"copied-{stale is None}" / BOM_FILE).read_bytes()
        assert json.loads(made) == make_ml_bom(read_spec(str(bundle)))


def test_metrics_warnings_and_origin_are_in_the_bill(bundle):
    weights = InitialWeights(
        source="imagenet",
        tensors=10,
        taken=8,
        tag="xception.tf_in1k",
        url="https://example.org/x",
        sha256="a" * 64,
    )
    model = check(make_ml_bom(changed(bundle, weights, synthetic=True)))
    (ancestor,) = model["pedigree"]["ancestors"]
    assert (ancestor["name"], ancestor["hashes"][0]["content"]) == ("xception.tf_in1k", "a" * 64)
    card = model["modelCard"]
    kappa, accuracy = card["quantitativeAnalysis"]["performanceMetrics"]
    assert (kappa["type"], kappa["value"]) == ("quadratic weighted kappa", "0.8123")
    assert kappa["confidenceInterval"] == {"lowerBound": "0.7500", "upperBound": "0.8600"}
    assert "confidenceInterval" not in accuracy
    assert "synthetic" in card["considerations"]["technicalLimitations"][0]


@pytest.mark.parametrize("source", ["/home/kim/weights.pth", "s3://clinic-of-kim/weights.safetensors"])
def test_a_file_of_initial_weights_is_named_by_its_hash(bundle, source):
    weights = InitialWeights(source=source, tensors=10, taken=10, url=source, sha256="b" * 64)
    bom = make_ml_bom(changed(bundle, weights, recipe={"weights": source}))
    check(bom)
    assert "kim" not in json.dumps(bom)
    assert "b" * 64 in json.dumps(bom)
