import json
import unicodedata

import pytest

from scalp_core.datasets.aihub import Folders, read_folders, read_label, read_meta, read_stem, stem_of

KERATIN, SEBUM, ERYTHEMA, HAIR_LOSS = 0, 1, 2, 5


@pytest.mark.parametrize(
    ("folder", "part", "symptom", "grade"),
    [
        ("Training/[원천]미세각질_0.양호", "Training", KERATIN, 0),
        ("Validation/[라벨]미세각질_3.중증", "Validation", KERATIN, 3),
        ("Training/[원천]미세각질_0.양호.zip", "Training", KERATIN, 0),
        ("Training.zip/[원천]미세각질_2.중등도", "Training", KERATIN, 2),
        ("Training/탈모/[원천]탈모_2.중등도", "Training", HAIR_LOSS, 2),
        ("Training/[라벨]피지 과다_1.경증", "Training", SEBUM, 1),
        ("Training/[원천]모낭사이 홍반_3.중증", "Training", ERYTHEMA, 3),
        ("1.미세각질/0.양호", None, KERATIN, 0),
        ("Training/원천데이터/미세각질_2.중증도", "Training", KERATIN, 2),  # as the paper spells it
        ("01.Training/01.원천데이터/[원천]1.미세각질_0.양호", "Training", KERATIN, 0),
        ("1.미세각질/[원천]2.중등도", None, KERATIN, 2),
        ("미세각질_2.중등도/extracted", None, KERATIN, 2),
        ("[원천]미세각질_2.경증", None, KERATIN, None),  # contradicts itself
        ("미세각질/photos", None, None, None),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_folders_are_read_in_every_form_they_are_found_in(folder, part, symptom, grade, form):
    found = read_folders(unicodedata.normalize(form, folder))
    assert (found.part, found.symptom, found.grade) == (part, symptom, grade)


@pytest.mark.parametrize(
    ("folder", "grade"),
    [("a/0", 0), ("a/mild", 1), ("2.중등도", 2), ("중증", 3), ("cats", None), ("7", None)],
)
def test_the_nearest_folder_may_be_a_class(folder, grade):
    assert read_folders(folder) == Folders(class_grade=grade)


def test_a_photograph_its_label_and_its_survey_share_a_stem():
    stem = "0013_A2LEBJJDE00060O_1602578303771_3_TH"
    for name in (f"a/{stem}.jpg", f"{stem}.json", f"Meta/{stem}_META.json"):
        assert stem_of(name) == stem
    shot = read_stem(stem)
    assert (shot.site, shot.device, shot.session, shot.position) == (
        "0013", "A2LEBJJDE00060O", "1602578303771", "TH"
    )  # fmt: skip
    assert shot.captured_at.isoformat() == "2020-10-13T08:38:23.771000+00:00"
    assert read_stem("holiday") is None


def label(**changes):
    return {f"value_{number}": "1" for number in range(1, 7)} | changes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_are_strings_or_numbers_with_or_without_a_mark(encoding):
    content = label(value_1=3, value_2=" 2 ")
    assert read_label(json.dumps(content).encode(encoding)) == [3, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (json.dumps(label(value_3="7")), "value_3 is '7'"),
        (json.dumps(label(value_3=None)), "value_3 is None"),
        (json.dumps(label(value_3="1.5")), "value_3"),
        (json.dumps({"value_1": "1"}), "value_2 is missing"),
        ("[1]", "not a JSON object"),
        ("{", "not valid JSON"),
        ("{'", "not valid JSON"),
    ],
)
def test_a_label_that_is_none_says_what_is_wrong(data, words):
    with pytest.raises(ValueError, match=words):
        read_label(data.encode())


def test_the_survey_gives_sex_age_and_position_and_nothing_else():
    data = json.dumps({"gender": "남", "age": "40대", "location": "TH", "question1": "x", "answers1": "y"})
    assert read_meta(data.encode("utf-8-sig")) == {"sex": "male", "age": "40s", "position": "TH"}
    assert read_meta(b"{}") == {"sex": None, "age": None, "position": None}
