"""The objects of a source and how they relate, as tables of a DuckDB: what is kept, dropped and odd.

A photograph and its label file, two copies of a picture, a name with two contents: all this is about
relations between objects, so it is said in SQL, and DuckDB answers it in bounded memory, spilling to disk.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa

from scalp_core import manifest, near_duplicates, parquet, storage
from scalp_core.grades import GRADE_NAMES, SYMPTOMS
from scalp_core.sql import spilling

DROPPED_FILE = "dropped.parquet"
FINDINGS_FILE = "findings.parquet"

# Reasons to drop a photograph beside errors.IMAGE_CODES and inventory.OBJECT_CODES.
REASONS = {
    "not_in_a_grade_folder": "no folder above it names a grade",
    "other_symptom": "it lies in a folder of another symptom",
    "no_label": "no label file has its name, or its row of the table has no label",
    "bad_label": "its label file does not hold six grades, or its label is no grade",
    "conflicting_labels": "the same picture, or the same name, has labels that differ",
    "duplicate_content": "another photograph with the same bytes is kept",
    "official_overlap": "its session or a copy of it is in the delivered Validation part",
}

# Things that a person should know of, by the word that counts them.
FINDINGS = {
    "photograph_without_label": "photographs without a label file of their name",
    "label_without_photograph": "label files without a photograph of their name",
    "meta_without_photograph": "META files without a photograph of their name",
    "bad_label_file": "label files that do not hold six grades",
    "bad_meta_file": "META files that cannot be read",
    "label_files_differ": "names whose label files contradict each other",
    "folder_and_label_file_differ": "photographs whose folder and label file name different grades",
    "content_in_several_symptoms": "contents that lie under more than one symptom",
    "content_in_both_parts": "contents that are in both Training and Validation",
    "conflicting_contents": "contents that have more than one label",
    "same_name_other_content": "names that more than one content has",
    "near_duplicate": "pairs of different files that show the same picture",
    "near_duplicate_labels_differ": "of these, pairs whose labels differ",
}

_DROPPED_OTHERS = (
    "select code, count(*) from object where kind in ('archive', 'other') and code is not null group by code"
)
_EXAMPLES = 8
_SHEET_COLUMNS = 8


class Relations:
    """The objects of a source as tables `object, photo, finding, kept` of a DuckDB that spills to disk."""

    def __init__(self, examined: str) -> None:
        self._open = ExitStack()
        self._sql = self._open.enter_context(spilling())
        self._sql.register("examined", parquet.dataset(examined))
        # An order that does not depend on where the files lie: of two copies the same one is kept, the
        # delivered Validation part's first.
        self._sql.execute("""
            create table object as
            select row_number() over (
                order by stem, part desc nulls last, symptom, folder_grade, uri, member
            ) - 1 as id, * from examined
        """)

    def __enter__(self) -> Relations:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def query(self, query: str) -> pa.Table:
        return self._sql.sql(query).to_arrow_table()

    def rows(self, query: str) -> list[dict[str, Any]]:
        return self.query(query).to_pylist()

    def number(self, query: str) -> int:
        return int(self._sql.execute(query).fetchall()[0][0])

    # --- what is kept ---------------------------------------------------------------------------------------

    def layout(self, is_table: bool, task: str | None) -> str:
        if task == "unlabelled":
            return "unlabelled"
        if is_table:
            return "table"
        photographs = "select count(*) from object where kind = 'photograph'"
        if self.number(f"{photographs} and symptom is not null and folder_grade is not null"):
            return "aihub"
        if task == "json" and self.number("select count(*) from object where kind = 'label'"):
            return "aihub"
        return "class_folders" if self.number(f"{photographs} and class_grade is not null") else "unlabelled"

    def decide(self, layout: str, task: str, symptom: str) -> None:
        """Makes `photo`: every photograph with its label, or the reason why it is dropped."""
        number = SYMPTOMS.index(symptom)
        label, unlabelled = {
            ("aihub", "folder"): (
                "folder_grade",
                f"""when symptom is null or folder_grade is null then 'not_in_a_grade_folder'
                    when symptom <> {number} then 'other_symptom'""",
            ),
            ("aihub", "json"): (
                f"truth.values[{number + 1}]",
                """when truth.stem is null then 'no_label'
                   when truth.answers = 0 then 'bad_label'
                   when truth.answers > 1 then 'conflicting_labels'""",
            ),
            ("class_folders", "folder"): (
                "class_grade", "when class_grade is null then 'not_in_a_grade_folder'"
            ),
            ("table", "table"): ("given_label", "when given_label is null then 'no_label'"),
        }.get((layout, task), ("null", "when false then ''"))  # fmt: skip
        self._sql.execute("""
            create table truth as
            select stem, count(distinct "values") as answers, min("values") as "values"
            from object where kind = 'label' group by stem
        """)
        self._sql.execute(f"""
            create table photo as
            select object.* exclude (position, "values"), truth.stem is not null as has_label_file,
                case when truth.answers = 1 then truth."values" end as labels,
                survey.sex as known_sex, survey.age as known_age,
                coalesce(object.position, survey.position) as position,
                cast({label} as tinyint) as label,
                case when code is not null then code {unlabelled} end as reason,
                error as detail
            from object
            left join truth using (stem)
            left join (
                select stem, min(sex) as sex, min(age) as age, min(position) as position
                from object where kind = 'meta' group by stem
            ) as survey using (stem)
            where kind = 'photograph'
        """)
        self._sql.execute("""
            update photo set reason = 'conflicting_labels', detail = 'sha256 ' || sha256
            where reason is null and sha256 in (
                select sha256 from photo where reason is null
                group by sha256 having count(distinct label) > 1
            )
        """)
        self._sql.execute("""
            update photo set reason = 'duplicate_content', detail = 'sha256 ' || sha256
            where reason is null
            and id not in (select min(id) from photo where reason is null group by sha256)
        """)

    # --- what is odd ----------------------------------------------------------------------------------------

    def near_duplicates(self) -> np.ndarray:
        """Pairs of ids of kept photographs that show the same picture; int64 (P, 2)."""
        found = self._sql.sql("select id, hash from photo where reason is null order by id").fetchnumpy()
        ids = np.asarray(found["id"], np.int64)
        pairs = near_duplicates.candidates(np.asarray(found["hash"], np.uint64))

        def thumbnails(positions: np.ndarray) -> np.ndarray:
            distinct, inverse = np.unique(ids[positions], return_inverse=True)
            self._sql.register("wanted", pa.table({"id": distinct}))
            column = self.query("select thumbnail from object join wanted using (id) order by id")[
                "thumbnail"
            ]
            joined = b"".join(column.to_pylist())
            return np.frombuffer(joined, np.uint8).reshape(-1, near_duplicates.THUMBNAIL_BYTES)[inverse]

        return ids[pairs[near_duplicates.confirmed(pairs, thumbnails)]].reshape(-1, 2)

    def find(self, layout: str, near: np.ndarray) -> None:
        """Makes `finding`: each object that a person should know of, with the word and what it is about."""
        self._sql.register("near", pa.table({"a": near[:, 0], "b": near[:, 1]}))
        readable = "select * from photo where sha256 is not null"
        queries = {
            "label_without_photograph": "select id, stem from object where kind = 'label' "
            "and stem not in (select stem from photo)",
            "meta_without_photograph": "select id, stem from object where kind = 'meta' "
            "and stem not in (select stem from photo)",
            "bad_label_file": "select id, error from object where kind = 'label' and code is not null",
            "bad_meta_file": "select id, error from object where kind = 'meta' and code is not null",
            "label_files_differ": "select id, stem from object where kind = 'label' "
            "and stem in (select stem from truth where answers > 1)",
            "folder_and_label_file_differ": "select id, 'folder ' || folder_grade || ', label file ' || "
            "labels[symptom + 1] from photo where folder_grade <> labels[symptom + 1]",
            "content_in_several_symptoms": f"select id, sha256 from ({readable}) where sha256 in "
            "(select sha256 from photo group by sha256 having count(distinct symptom) > 1)",
            "content_in_both_parts": f"select id, sha256 from ({readable}) where sha256 in "
            "(select sha256 from photo group by sha256 having count(distinct part) > 1)",
            "conflicting_contents": "select id, sha256 from photo where reason = 'conflicting_labels' "
            "and detail like 'sha256 %'",
            "same_name_other_content": f"select id, stem from ({readable}) where stem in "
            "(select stem from photo group by stem having count(distinct sha256) > 1)",
            "near_duplicate": "select b as id, object.uri || coalesce('!' || object.member, '') "
            "from near join object on object.id = near.a",
            "near_duplicate_labels_differ": "select near.b as id, 'labels ' || "
            "least(one.label, other.label) || ' and ' || greatest(one.label, other.label) "
            "from near join photo one on one.id = near.a join photo other on other.id = near.b "
            "where one.label <> other.label",
        }
        if layout == "aihub":
            queries["photograph_without_label"] = "select id, stem from photo where not has_label_file"
        self._sql.execute("create table finding (id bigint, finding varchar, detail varchar)")
        for word, query in queries.items():
            self._sql.execute(
                f"insert into finding select id, '{word}', detail from ({query}) as q(id, detail)"
            )

    # --- groups and parts -----------------------------------------------------------------------------------

    def candidates(self) -> pa.Table:
        """What is kept, and the copies of it that are not, which tie groups together; by id.

        Keys are small numbers, -1 for none.
        """
        keys = {
            "sha256": "sha256",
            "given_group": "given_group",
            "device": "site || '_' || device",
            "session": "site || '_' || device || '_' || session",
        }
        codes = ", ".join(
            f"case when {key} is null then -1 else dense_rank() over (order by {key}) end::int as {name}"
            for name, key in keys.items()
        )
        return self.query(f"""
            select id, reason is null as kept, coalesce(label, 0) as label,
                coalesce(part, '') as part, {codes}
            from photo where reason is null or reason = 'duplicate_content' order by id
        """)

    def fingerprint(self) -> str:
        """That of `manifest.fingerprint`, without the rows in memory."""
        made = manifest.Fingerprint()
        reader = self._sql.sql("select sha256, label, split, fold from kept").to_arrow_reader(50_000)
        for batch in reader:
            made.update(batch)
        return made.hexdigest()

    def assign(self, assigned: pa.Table, keys: tuple[str, ...]) -> None:
        """Makes `kept` of `id, component, split, fold`; a kept photograph without a split is an overlap."""
        self._sql.register("assigned", assigned)
        self._sql.execute("""
            update photo set reason = 'official_overlap', detail = 'its group is in Validation too'
            from assigned where photo.id = assigned.id and reason is null and assigned.split = 'overlap'
        """)
        names = ["given_group"]
        names += ["site || '_' || device"] * ("device" in keys)
        names += ["site || '_' || device || '_' || session"] * ("session" in keys)
        first = ", ".join(f"min({name})" for name in names)
        self._sql.execute(f"""
            create table kept as
            with named as (
                select component, coalesce({first}, min(substr(sha256, 1, 20))) as "group"
                from photo join assigned using (id) group by component
            )
            select substr(sha256, 1, 20) as image_id, uri, member, sha256, width, height, label, labels, site,
                device, captured_at, position, known_sex as sex, known_age as age, "group",
                cast(fold as tinyint) as fold, split, part as source_note,
                byte_offset, byte_length, compression, photo.id
            from photo join assigned using (id) join named using (component)
            where reason is null
        """)

    # --- what is written ------------------------------------------------------------------------------------

    def write(self, out: str) -> None:
        columns = ", ".join(f'"{name}"' for name in manifest.SCHEMA.names)
        rows = self._stream(f"select {columns} from kept order by split, image_id", manifest.SCHEMA)
        manifest.write_manifest(out, rows)
        named = {name: pa.string() for name in ("uri", "member", "reason", "detail")}
        dropped = self._stream(
            "select uri, member, reason, detail from photo where reason is not null union all "
            "select uri, member, code, error from object where kind in ('archive', 'other') "
            "and code is not null order by all",
            pa.schema(named),
        )
        parquet.write_batches(storage.join(out, DROPPED_FILE), dropped)
        named = {name: pa.string() for name in ("finding", "uri", "member", "detail")}
        findings = self._stream(
            "select finding, uri, member, detail from finding join object using (id) order by all",
            pa.schema(named),
        )
        parquet.write_batches(storage.join(out, FINDINGS_FILE), findings)

    def _stream(self, query: str, schema: pa.Schema) -> pa.RecordBatchReader:
        reader = self._sql.sql(query).to_arrow_reader(50_000)
        return pa.RecordBatchReader.from_batches(schema, (batch.cast(schema) for batch in reader))

    # --- what is told ---------------------------------------------------------------------------------------

    def counts(self) -> dict[str, Any]:
        """Counts for the summary and the report."""
        return {
            "objects": self._count("select kind, count(*) from object group by kind"),
            "dropped": self._count(
                "select reason, count(*) from photo where reason is not null group by reason "
                f"union all {_DROPPED_OTHERS}"
            ),
            "findings": self._findings(),
            "parts": {
                name: self.rows(f"""
                    select count(*) as photographs, count(distinct "group") as groups,
                        count(distinct site || device) as devices from kept where split = '{name}'
                """)[0]
                | {"by_grade": self._grades(f"where split = '{name}'")}
                for name in manifest.PARTS
            },
            "folds": [
                {"fold": number, "by_grade": self._grades(f"where fold = {number}")}
                for number in range(self.number("select coalesce(max(fold) + 1, 0) from kept"))
            ],
            "by_grade": self._grades(""),
            "unlabelled": self.number("select count(*) from kept where label is null"),
            "dropped_other": self._count(_DROPPED_OTHERS),
            "could_not_be_fetched": self.number(
                "select count(*) from object where code = 'fetch_failed'"
            ),
            "by": {
                column: self._slices(column) for column in ("site", "device", "position", "sex", "age")
            },
            "grouped_by": self._count("""
                select case when given_group is not null then 'group of the table'
                    when device is not null then 'device' else 'photograph' end, count(*)
                from photo where reason is null group by all
            """),
        }  # fmt: skip

    def _count(self, query: str) -> dict[str, int]:
        totals: dict[str, int] = {}
        for name, count in self._sql.sql(query).fetchall():
            totals[name] = totals.get(name, 0) + count
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))

    def _findings(self) -> dict[str, int]:
        """By word: how many of what `FINDINGS` says, which are names, contents or pairs and not files."""
        distinct = {
            "label_files_differ", "content_in_several_symptoms", "content_in_both_parts",
            "conflicting_contents", "same_name_other_content",
        }  # fmt: skip
        rows = self._sql.sql(
            "select finding, count(*), count(distinct detail) from finding group by finding"
        ).fetchall()
        found = {word: contents if word in distinct else files for word, files, contents in rows}
        return {word: found.get(word, 0) for word in FINDINGS}

    def _grades(self, where: str) -> dict[str, int]:
        found = dict(self._sql.sql(f"select label, count(*) from kept {where} group by label").fetchall())
        return {name: found.get(grade, 0) for grade, name in enumerate(GRADE_NAMES)}

    def _slices(self, column: str) -> list[dict[str, Any]]:
        grades = ", ".join(f"count(*) filter (label = {grade})" for grade in range(len(GRADE_NAMES)))
        return self.rows(f"""
            select {column} as value, count(*) as photographs, [{grades}] as by_grade
            from kept group by {column} order by value nulls last
        """)

    def examples(self, near: np.ndarray) -> dict[str, Any]:
        """A few photographs of each kind, for the report."""
        pairs = near[:_EXAMPLES]
        return {
            "sheets": {
                grade: self.rows(f"""
                    select uri, member from (
                        select *, row_number() over (partition by site, device order by image_id) as turn
                        from kept where label = {grade}
                    ) order by turn, image_id limit {_SHEET_COLUMNS}
                """)
                for grade in range(len(GRADE_NAMES))
            },
            "near_pairs": [
                [self.rows(f"select uri, member, label from photo where id = {id_}")[0] for id_ in pair]
                for pair in pairs.tolist()
            ],
            "dropped_examples": self.rows(f"""
                select reason, uri, member, detail from photo where reason is not null
                qualify row_number() over (partition by reason order by id) <= {_EXAMPLES // 2}
                order by reason, uri
            """),
        }  # fmt: skip
