"""Settings: old spellings of renamed keys."""

import pytest

from scalp_core.errors import UserError
from scalp_core.settings import load_yaml, parse_overrides, parse_settings
from scalp_core.synthetic.plan import SynthOptions


def test_old_spelling_of_a_key_is_accepted(tmp_path):
    expected = SynthOptions(color_cast=0.2)
    assert parse_settings(SynthOptions, parse_overrides(["colour_cast=0.2"]), "--set") == expected
    assert SynthOptions.model_validate_json('{"colour_cast": 0.2}') == expected
    file = tmp_path / "options.yaml"
    file.write_text("colour_cast: 0.5\n")
    values, origin = load_yaml("options", str(file), tmp_path)
    # The new spelling replaces a value that a file gives under the old one.
    assert parse_settings(SynthOptions, values | parse_overrides(["color_cast=0.2"]), origin) == expected


def test_unknown_key_is_refused_with_the_nearest_present_spelling():
    with pytest.raises(UserError, match="unknown key 'colour_casts'; did you mean 'color_cast'"):
        parse_settings(SynthOptions, parse_overrides(["colour_casts=0.2"]), "--set")
