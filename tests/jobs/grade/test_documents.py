"""Results as clinical documents: from an image in DICOM to its report, read by other libraries."""

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from fhir.resources.bundle import Bundle as BundleR5
from fhir.resources.R4B.bundle import Bundle as BundleR4B
from highdicom.sr import ComprehensiveSR
from pydicom import dcmread
from pydicom.sr.codedict import codes
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.grade import driver as grade_driver
from jobs.grade.results import results
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.results.query import Selection
from scalp_core.storage import outputs
from tests.support.dicom_files import PATIENT, dicom
from tests.support.result_rows import row, write
from tests.support.small_grade import SIDE, picture, rows, run, write_bundle

KOREAN = "Kim^Haneul=金^하늘=김^하늘"


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A finished run on a JPEG, DICOM files of patients, and a damaged one."""
    root = tmp_path_factory.mktemp("clinic")
    dicom_file = dicom(picture(1), (SIDE, SIDE))
    utf8 = {"SpecificCharacterSet": "ISO_IR 192", "PatientName": KOREAN, "PatientID": "P-9"}
    files = {
        "plain.jpg": picture(0),
        "named.dcm": dicom_file,
        "korean.dcm": dicom(picture(2), (SIDE, SIDE), **utf8),
        "cut.dcm": dicom_file[:-400],
        "Kim^Haneul.jpg": b"a text",  # a name in a path stays out of documents
    }
    for name, data in files.items():
        storage.write(str(root / "source" / name), data)
    run(write_bundle(str(root / "bundle")), [str(root / "source")], str(root / "out"), report=False)
    return root


@pytest.fixture
def out(graded):
    return str(graded / "out")


def named(uri):
    return uri.rsplit("/", 1)[-1]


def export(out, to, *options):
    found = CliRunner().invoke(app, ["results", out, "--output", str(to), *options], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return to.read_bytes()


def fhir(out, tmp_path, *options):
    """Observation and report by the name of the image's file, validated as R5 and as R4B."""
    lines = export(out, tmp_path / "a.ndjson", "--write", "fhir", *options).splitlines()
    documents = {}
    for line, stored in zip(lines, rows(out), strict=True):
        BundleR5.model_validate_json(line)
        BundleR4B.model_validate_json(line)
        entries = json.loads(line)["entry"]
        observation, report = (entry["resource"] for entry in entries)
        assert report["result"] == [{"reference": entries[0]["fullUrl"]}]
        documents[named(stored["uri"])] = observation, report
    return documents


def reports(out, tmp_path, *options):
    """Structured reports by the name of the image's file, read by highdicom."""
    data = export(out, tmp_path / "a.zip", "--write", "dicom-sr", "--overwrite", *options)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    stored = {f"{each['location_id']}.dcm": named(each["uri"]) for each in rows(out)}
    assert files.keys() == stored.keys()
    return {
        stored[name]: ComprehensiveSR.from_dataset(dcmread(io.BytesIO(file))) for name, file in files.items()
    }


def evaluations(report):
    (group,) = report.content.get_image_measurement_groups()
    pairs = [(each.name.value, each.value.value) for each in group.get_qualitative_evaluations()]
    numbers = {each.name.value: float(each.value) for each in group.get_measurements()}
    return pairs, numbers


def texts(report):
    items = [(item.ConceptNameCodeSequence[0].CodeValue, item) for item in report.ContentSequence]
    return " ".join(item.TextValue for code, item in items if code == codes.DCM.Comment.value)


def local_code(component):
    return component["valueCodeableConcept"]["coding"][0]["code"]


def test_fhir_has_the_answer_of_each_row(out, tmp_path):
    documents = fhir(out, tmp_path)
    for stored in rows(out):
        observation, report = documents[named(stored["uri"])]
        components = [(each["code"]["coding"][0]["code"], each) for each in observation.get("component", [])]
        assert "Not a diagnosis" in observation["note"][0]["text"]
        assert stored["model_version"] in observation["note"][0]["text"]
        assert observation["meta"]["security"][0]["code"] == "AIAST"
        assert observation["device"]["identifier"]["value"] == stored["model_version"]
        if stored["status"] == "failed":
            assert observation["status"] == report["status"] == "cancelled"
            absent = [each["code"] for each in observation["dataAbsentReason"]["coding"]]
            assert absent == ["error", stored["error_code"]]
            assert stored["error_code"] in report["conclusion"]
            assert "valueCodeableConcept" not in observation
            continue
        assert observation["status"] == report["status"] == "preliminary"
        (value,) = observation["valueCodeableConcept"]["coding"]
        assert (value["code"], value["display"]) == (f"grade-{stored['grade']}", stored["grade_name"])
        probabilities = [
            each["valueQuantity"]["value"] for code, each in components if code.startswith("prob")
        ]
        assert probabilities == pytest.approx(stored["probabilities"], abs=1e-6)
        plausible = [local_code(each) for code, each in components if code == "plausible-grade"]
        assert plausible == [f"grade-{grade}" for grade in stored["grade_set"]]
        reasons = [local_code(each) for code, each in components if code == "refer-reason"]
        assert (dict(components)["refer"]["valueBoolean"], reasons) == (
            stored["refer"],
            stored["refer_reasons"],
        )
        assert all(f"({reason})" in report["conclusion"] for reason in reasons)


@pytest.mark.medium
def test_a_structured_report_has_the_answer_of_each_row(out, tmp_path):
    documents = reports(out, tmp_path)
    for stored in rows(out):
        report = documents[named(stored["uri"])]
        pairs, numbers = evaluations(report)
        assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
        assert "Not a diagnosis" in texts(report)
        assert stored["model_version"] in texts(report)
        if stored["status"] == "failed":
            assert (report.CompletionFlag, pairs, numbers) == (
                "PARTIAL",
                [("not-graded", stored["error_code"])],
                {},
            )
            continue
        assert report.CompletionFlag == "COMPLETE"
        assert pairs == [
            ("grade", f"grade-{stored['grade']}"),
            *(("plausible-grade", f"grade-{grade}") for grade in stored["grade_set"]),
            ("refer", "yes" if stored["refer"] else "no"),
            *(("refer-reason", reason) for reason in stored["refer_reasons"]),
        ]
        assert numbers.pop("expected-severity") == pytest.approx(stored["expected_severity"], abs=1e-6)
        assert list(numbers.values()) == pytest.approx(stored["probabilities"], abs=1e-6)


@pytest.mark.medium
def test_documents_name_no_patient_unless_asked_to(out, tmp_path):
    lines = export(out, tmp_path / "a.ndjson", "--write", "fhir").decode()
    assert not [value for value in PATIENT if value in lines]
    documents = reports(out, tmp_path)
    for report in documents.values():
        text = str(report)
        assert not [value for value in PATIENT if value in text]
        assert "CurrentRequestedProcedureEvidenceSequence" not in report  # no image that an archive lacks
    studies = {report.StudyInstanceUID for report in documents.values()}
    assert len(studies) == 5  # unknown patients are not put into one study


def test_with_patients_a_report_goes_to_the_study_of_its_image(graded, out, tmp_path):
    documents, observed = reports(out, tmp_path, "--patients"), fhir(out, tmp_path, "--patients")
    for name in ("named.dcm", "korean.dcm", "cut.dcm"):
        image, report = dcmread(graded / "source" / name, stop_before_pixels=True), documents[name]
        for keyword in (
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "StudyInstanceUID",
            "StudyDate",
            "StudyTime",
        ):
            assert report[keyword].value == image[keyword].value, keyword
        (study,) = report.CurrentRequestedProcedureEvidenceSequence
        (reference,) = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
        assert reference.ReferencedSOPInstanceUID == image.SOPInstanceUID
        observation, _ = observed[name]
        assert observation["subject"]["identifier"]["value"] == image.PatientID
        assert observation["derivedFrom"][1]["identifier"]["value"] == f"urn:oid:{image.StudyInstanceUID}"
    assert documents["plain.jpg"].PatientID == ""
    assert "subject" not in observed["plain.jpg"][0]


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["fhir", "dicom-sr"])
def test_the_same_rows_make_the_same_file(out, tmp_path, kind):
    suffix = {"fhir": ".ndjson", "dicom-sr": ".zip"}[kind]
    first, second = (export(out, tmp_path / f"{name}{suffix}", "--write", kind) for name in "ab")
    assert first == second


def test_a_model_of_synthetic_images_is_named_as_one(tmp_path):
    out = str(tmp_path / "out")
    write(storage.join(out, "results"), [row("/clinic/a.jpg")], files=1)
    storage.write(storage.join(out, "summary.json"), b'{"synthetic": true}')
    assert b"trained on synthetic images" in export(out, tmp_path / "a.ndjson", "--write", "fhir")
    (report,) = reports(out, tmp_path).values()
    assert "trained on synthetic images" in texts(report)


def test_grades_of_another_symptom_make_no_documents(tmp_path):
    out = str(tmp_path / "out")
    write(storage.join(out, "results"), [row("/clinic/a.jpg")], files=1)
    storage.write(storage.join(out, "summary.json"), b'{"symptom": "dandruff"}')
    with pytest.raises(
        UserError, match=r"are of dandruff \(비듬\), .* of micro-keratin alone; write the rows"
    ):
        results(out, to=str(tmp_path / "a.ndjson"), write="fhir")
    assert not (tmp_path / "a.ndjson").exists()


def test_what_makes_no_document_is_refused(graded, out, tmp_path, monkeypatch):
    def refused(match, **options):
        to = options.pop("to", str(tmp_path / "a.zip"))
        with pytest.raises(UserError, match=match):
            results(options.pop("out", out), to=to, **options)
        assert not list(tmp_path.glob("*.zip"))

    refused("ends in .zip", write="dicom-sr", to=str(tmp_path / "a.ndjson"))
    refused("name its file with --output FILE.ndjson", write="fhir", to=None)
    refused("omit --by", write="dicom-sr", by="grade")
    refused("--patients is for documents", patients=True)
    refused("no row with --path-prefix", write="dicom-sr", selection=Selection(path_prefix="/nowhere"))
    unfinished = str(tmp_path / "unfinished")
    write(storage.join(unfinished, ".scalp-work/graded"), [row("/clinic/a.jpg")], files=1)
    storage.write(storage.join(unfinished, "run.json"), b"{}")
    refused("is not finished; finish it", write="dicom-sr", out=unfinished)
    monkeypatch.setitem(sys.modules, "highdicom.sr", None)
    monkeypatch.delitem(sys.modules, "scalp_core.results.dicom_sr", raising=False)
    refused("install the extra scalp", write="dicom-sr")


def test_a_changed_image_names_no_patient(graded, out, tmp_path):
    path = graded / "source" / "named.dcm"
    before = path.read_bytes()
    path.write_bytes(dicom(picture(9), (SIDE, SIDE), PatientID="P-1"))
    try:
        with pytest.raises(UserError, match="named.dcm cannot be read again .*changed.*omit --patients"):
            results(out, to=str(tmp_path / "a.zip"), write="dicom-sr", patients=True)
    finally:
        path.write_bytes(before)


# --- scalp grade --write ------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """Bundle, sources and output of a run of a good and a damaged image."""
    storage.write(str(tmp_path / "source" / "a.jpg"), picture(0))
    storage.write(str(tmp_path / "source" / "b.jpg"), picture(1)[:-100])
    return write_bundle(str(tmp_path / "bundle")), [str(tmp_path / "source")], str(tmp_path / "out")


def files_of(out):
    return {path.name: path.read_bytes() for path in (Path(out) / "documents").iterdir()}


def grade_command(small, *options):
    """Run the command line, whose run would fail if it began: the bundle has no weights."""
    bundle, sources, out = small
    return CliRunner().invoke(app, ["grade", bundle, *sources, out, "--local", *options])


@pytest.mark.medium
def test_grade_writes_the_documents_that_results_writes(small, tmp_path):
    out = small[2]
    summary = run(*small, report=False, documents=["dicom-sr", "fhir"])
    assert summary["documents"] == ["fhir", "dicom-sr"]
    assert files_of(out) == {
        "fhir.ndjson": export(out, tmp_path / "a.ndjson", "--write", "fhir"),
        "dicom-sr.zip": export(out, tmp_path / "a.zip", "--write", "dicom-sr"),
    }
    with pytest.raises(UserError, match="is in a folder of the run's own files"):
        results(out, to=f"{out}/documents/fhir.ndjson", write="fhir", overwrite=True)


def test_a_finished_run_gets_documents_once_and_a_retry_renews_them(small):
    out = small[2]
    run(*small, report=False)
    assert not (Path(out) / "documents").exists()
    run(*small, report=False, documents=["fhir"])
    first = files_of(out)
    stamp = (Path(out) / "documents" / "fhir.ndjson").stat().st_mtime_ns
    assert run(*small, report=False, documents=["fhir"])["documents"] == ["fhir"]
    assert (Path(out) / "documents" / "fhir.ndjson").stat().st_mtime_ns == stamp
    storage.write(f"{small[1][0]}/b.jpg", picture(1))
    run(*small, report=False, retry=True)
    (renewed,) = files_of(out).values()
    assert [first["fhir.ndjson"].count(b"cancelled"), renewed.count(b"cancelled")] == [2, 0]


def test_a_run_that_is_stopped_at_its_documents_gets_them_by_the_same_command(small, monkeypatch):
    out = small[2]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grade_driver, "export_documents", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(*small, report=False, documents=["fhir"])
    run(*small, report=False, documents=["fhir"])
    assert len(files_of(out)["fhir.ndjson"].splitlines()) == 2
    assert not outputs.has_scratch(out)


def test_documents_of_a_run_that_ended_in_between_stay_in_the_summary(small, monkeypatch):
    run(*small, report=False)
    open_output = outputs.open_output

    def open_later(*arguments):
        monkeypatch.setattr(outputs, "open_output", open_output)
        run(*small, report=False, documents=["dicom-sr"])
        return open_output(*arguments)

    monkeypatch.setattr(outputs, "open_output", open_later)
    assert run(*small, report=False, documents=["fhir"])["documents"] == ["dicom-sr", "fhir"]
    assert files_of(small[2]).keys() == {"fhir.ndjson", "dicom-sr.zip"}


def test_a_finished_run_with_reports_needs_no_highdicom_if_none_are_written(small, monkeypatch):
    summary = run(*small, report=False, documents=["dicom-sr"])
    monkeypatch.setitem(sys.modules, "highdicom.sr", None)
    monkeypatch.delitem(sys.modules, "scalp_core.results.dicom_sr", raising=False)
    assert run(*small, report=False) == summary
    with pytest.raises(UserError, match="install the extra scalp"):
        run(*small, report=False, retry=True)


def test_a_partial_file_of_a_killed_run_is_removed(small):
    run(*small, report=False)
    storage.write(f"{small[2]}/documents/.fhir.ndjson.{'0' * 32}.scalp-tmp", b"{")
    run(*small, report=False, documents=["fhir"])
    assert files_of(small[2]).keys() == {"fhir.ndjson"}


@pytest.mark.parametrize("options", [(), ("--plan",)])
def test_documents_that_cannot_be_written_are_refused_before_grading(small, tmp_path, monkeypatch, options):
    _, sources, out = small
    other = write_bundle(str(tmp_path / "other"), symptom="dandruff")
    refused = grade_command((other, sources, out), "--write", "fhir", *options)
    assert "are of dandruff" in str(refused.exception)
    monkeypatch.setitem(sys.modules, "highdicom.sr", None)
    monkeypatch.delitem(sys.modules, "scalp_core.results.dicom_sr", raising=False)
    refused = grade_command(small, "--write", "dicom-sr", *options)
    assert "install the extra scalp" in str(refused.exception)
    assert not Path(out).exists()


def test_documents_of_somebody_else_are_refused_and_kept(small):
    out = small[2]
    run(*small, report=False)
    storage.write(f"{out}/documents/fhir.ndjson", b"mine")
    with pytest.raises(UserError, match="fhir.ndjson exists, and --write did not make it; move it away"):
        run(*small, report=False, documents=["fhir"])
    assert files_of(out) == {"fhir.ndjson": b"mine"}
