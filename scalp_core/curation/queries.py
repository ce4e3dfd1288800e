"""Audit queries in DuckDB over the objects of a source: kept images, dropped images and findings.

An image and its label file, two copies of an image, a name with two contents: these are joins, so they are
written in SQL. DuckDB runs them in bounded memory and spills to disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from joblib import cpu_count

from scalp_core import storage
from scalp_core.curation import near_duplicates
from scalp_core.curation.finding_queries import FINDING_QUERIES
from scalp_core.datasets import manifest
from scalp_core.datasets.fingerprints import describe_symptoms, fingerprint
from scalp_core.datasets.group_by import GroupBy
from scalp_core.datasets.scan import EXAMINED
from scalp_core.grades import SYMPTOM_IDS, SYMPTOMS
from scalp_core.images.signature import THUMBNAIL_BYTES
from scalp_core.storage import parquet
from scalp_core.storage.duckdb_sql import open_duckdb

DROPPED_FILE = "dropped.parquet"
FINDINGS_FILE = "findings.parquet"

_MEMORY_MIB = 1_024
_ROWS_READ = 8_192
_ROWS_WRITTEN = 50_000
_DEVICE = "site || '_' || device"
_SESSION = "site || '_' || device || '_' || session"
_GROUP_KEYS = {"given_group": "given_group", "device": _DEVICE, "session": _SESSION}


Grouping = Callable[[pa.RecordBatch], pa.Array]
"""Returns the group of each object of a batch without one in its row, string or null."""


def _group(source: str, group_by: GroupBy, batch: pa.RecordBatch) -> pa.Array:
    paths = pc.binary_join_element_wise(batch["uri"], batch["member"], "/", null_handling="skip").to_pylist()
    return pa.array([group_by.group_of(path.removeprefix(source).lstrip("/")) for path in paths], pa.string())


@contextmanager
def open_audit_tables(examined: str, source: str, group_by: GroupBy | None) -> Iterator[AuditTables]:
    """Read a folder of Parquet files of `scan.EXAMINED` into a local database; `group_by` sets its groups."""
    with (
        open_duckdb(_MEMORY_MIB, min(8, cpu_count())) as sql,
        TemporaryFile(prefix="scalp-thumbnails-") as thumbnails,
    ):
        grouping = partial(_group, source, group_by) if group_by else None
        yield AuditTables(examined, sql, thumbnails, grouping)


class AuditTables:
    """The objects of a source as tables `object, photo, finding, kept` of a DuckDB that spills to disk.

    The methods are called in this order: `find_layout, label_images, read_extended (if there is such data),
    find_near_duplicates, collect_findings, read_candidates, assign_splits, add_joints, write_outputs`.
    """

    def __init__(self, examined: str, sql: Any, thumbnails: Any, grouping: Grouping | None) -> None:
        self._sql = sql
        self._grouping = grouping
        self._thumbnails = thumbnails
        columns = [field for field in EXAMINED if field.name != "thumbnail"]
        schema = pa.schema([pa.field("row", pa.int64()), *columns])
        # A row has a kilobyte of thumbnail: Arrow's default readahead of 16 batches would take 2 GiB.
        batches = parquet.dataset(examined, schema=EXAMINED).to_batches(
            batch_size=_ROWS_READ, batch_readahead=2, fragment_readahead=1
        )
        batches = self._without_thumbnails(batches, schema)
        self._sql.register("examined", pa.RecordBatchReader.from_batches(schema, batches))
        # Sorted independently of the Parquet files, so that the same one of two copies is kept; a copy in the
        # delivered Validation split comes first.
        self._sql.register("manifest_schema", manifest.SCHEMA.empty_table())
        self._sql.execute("create table extended as from manifest_schema")
        self._sql.execute("""
            create table object as
            select row_number() over () - 1 as id, *, md5_number(sha256) as content from (
                from examined order by part desc nulls last, stem, symptom, folder_grade, uri, member
            )
        """)

    def _without_thumbnails(
        self, batches: Iterator[pa.RecordBatch], schema: pa.Schema
    ) -> Iterator[pa.RecordBatch]:
        """Move thumbnails to a local file, by row: a kilobyte per image, read again only for candidates."""
        rows = 0
        for batch in batches:
            empty = bytes(THUMBNAIL_BYTES)
            self._thumbnails.writelines(value or empty for value in batch["thumbnail"].to_pylist())
            numbers = pa.array(np.arange(rows, rows + len(batch)))
            rows += len(batch)
            columns = {name: batch[name] for name in schema.names[1:]}
            if self._grouping:
                columns["given_group"] = pc.coalesce(batch["given_group"], self._grouping(batch))
            yield pa.record_batch([numbers, *columns.values()], schema=schema)

    def rows(self, query: str) -> list[dict[str, Any]]:
        return self._sql.sql(query).to_arrow_table().to_pylist()

    def number(self, query: str) -> int:
        return int(self._sql.execute(query).fetchall()[0][0])

    def count(self, query: str) -> dict[str, int]:
        """Sum the counts of a query by name, the largest first."""
        totals: dict[str, int] = {}
        for name, count in self._sql.sql(query).fetchall():
            totals[name] = totals.get(name, 0) + count
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))

    # --- kept images ----------------------------------------------------------------------------------------

    def find_layout(self, is_table: bool, task: str | None) -> str:
        """Detect the layout of the source: table, aihub, class_folders or unlabelled."""
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

    def find_symptoms(self) -> list[str]:
        """Find the symptoms of which a table has grades."""
        counts = ", ".join(f"count(given_labels[{place}])" for place in range(1, len(SYMPTOMS) + 1))
        (row,) = self._sql.sql(f"select {counts} from object").fetchall()
        return [symptom for symptom, count in zip(SYMPTOMS, row, strict=True) if count]

    def label_images(self, layout: str, task: str, symptom: str) -> None:
        """Create table `photo`: each image with its label, or the reason to drop it."""
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
            ("table", "table"): (
                f"coalesce(given_label, given_labels[{number + 1}])",
                f"""when given_label <> given_labels[{number + 1}] then 'conflicting_labels'
                    when given_label is null and given_labels[{number + 1}] is null then 'no_label'""",
            ),
        }.get((layout, task), ("null", "when false then ''"))  # fmt: skip
        # The label of a table is the grade of one of the six symptoms.
        grades = [f"given_labels[{place}]" for place in range(1, len(SYMPTOMS) + 1)]
        grades[number] = f"coalesce({grades[number]}, {label})"
        self._sql.execute("""
            create table truth as
            select stem, count(distinct "values") as answers, min("values") as "values"
            from object where kind = 'label' group by stem
        """)
        self._sql.execute(f"""
            create table photo as
            select object.* exclude (position, "values"), truth.stem is not null as has_label_file,
                case when given_labels is not null then [{", ".join(grades)}]::tinyint[]
                    when truth.answers = 1 then truth."values" end as labels,
                survey.sex as known_sex, survey.age as known_age,
                coalesce(object.position, survey.position) as position,
                cast({label} as tinyint) as label,
                case when code is not null then code {unlabelled} end as reason,
                case when code is null and given_label <> given_labels[{number + 1}]
                    then 'label ' || given_label || ', {SYMPTOM_IDS[number]} ' || given_labels[{number + 1}]
                    else error end as detail
            from object
            left join truth using (stem)
            left join (
                select stem, min(sex) as sex, min(age) as age, min(position) as position
                from object where kind = 'meta' group by stem
            ) as survey using (stem)
            where kind = 'photograph'
        """)
        # Contents of more than one image, which are few in any source.
        self._sql.execute("""
            create table repeated as
            select content, min(id) filter (reason is null) as keeper,
                coalesce(min(label) filter (reason is null) <> max(label) filter (reason is null), false)
                    as conflicting,
                coalesce(min(symptom) <> max(symptom), false) as in_several_symptoms,
                coalesce(min(part) <> max(part), false) as in_both_parts
            from photo where content is not null group by content having count(*) > 1
        """)
        self._join_labels_of_copies()
        self._sql.execute("""
            update photo set detail = 'sha256 ' || sha256,
                reason = if(repeated.conflicting, 'conflicting_labels', 'duplicate_content')
            from repeated where photo.content = repeated.content
            and reason is null and (repeated.conflicting or photo.id <> repeated.keeper)
        """)

    def _join_labels_of_copies(self) -> None:
        """Create table `joined`: grades of the symptoms of each content; null where its copies differ."""
        places = range(1, len(SYMPTOMS) + 1)
        joined = ", ".join(f"if(min(labels[{n}]) = max(labels[{n}]), min(labels[{n}]), null)" for n in places)
        differ = " or ".join(f"coalesce(min(labels[{n}]) <> max(labels[{n}]), false)" for n in places)
        self._sql.execute(f"""
            create table joined as
            select content, [{joined}]::tinyint[] as labels, {differ} as differ
            from photo semi join repeated using (content)
            where reason is null and labels is not null group by content
        """)
        self._sql.execute("""
            update photo set labels = joined.labels from joined
            where photo.content = joined.content and reason is null
                and photo.labels is distinct from joined.labels
        """)

    # --- extended data --------------------------------------------------------------------------------------

    def read_extended(self, data: str) -> None:
        """Fill table `extended` with the manifest of prepared data, whose images are among the objects."""
        self._sql.register("manifest_of_data", manifest.read_manifest(data))
        self._sql.execute("insert into extended by name from manifest_of_data")

    def known_splits(self, ids: np.ndarray) -> np.ndarray:
        """Splits of the images of the extended data, object (N,); None for others."""
        self._sql.register("wanted", pa.table({"id": ids}))
        query = "select split from wanted join photo using (id) left join extended using (sha256) order by id"
        return np.array(self._sql.sql(query).to_arrow_table()["split"].to_pylist(), dtype=object)

    def _keep_extended(self) -> None:
        """Keep what the extended data has in its rows, and the names of its groups."""
        names = [name for name in manifest.SCHEMA.names if name not in ("sha256", "fold", "split")]
        columns = ", ".join(f'"{name}" = extended."{name}"' for name in names)
        self._sql.execute(f"update kept set {columns} from extended where kept.sha256 = extended.sha256")
        self._sql.execute("""
            update kept set "group" = named.name from (
                select component, min(kept."group") as name
                from kept semi join extended using (sha256) group by component
            ) as named
            where kept.component = named.component and sha256 not in (select sha256 from extended)
        """)

    # --- findings -------------------------------------------------------------------------------------------

    def find_near_duplicates(self) -> near_duplicates.NearDuplicates:
        """Find pairs of kept images that show the same, and images with too many similar ones, by id."""
        candidates = self._sql.sql("""
            select id, "row", hash, turned_hash from photo
            where reason is null and hash is not null order by id
        """).fetchnumpy()
        ids, rows = candidates["id"], candidates["row"]
        self._thumbnails.flush()

        def thumbnails(positions: np.ndarray) -> np.ndarray:
            file = self._thumbnails.fileno()
            read = [
                os.pread(file, THUMBNAIL_BYTES, row * THUMBNAIL_BYTES) for row in rows[positions].tolist()
            ]
            return np.frombuffer(b"".join(read), np.uint8).reshape(-1, THUMBNAIL_BYTES)

        pairs, crowded = near_duplicates.find_pairs(candidates["hash"], candidates["turned_hash"], thumbnails)
        return near_duplicates.NearDuplicates(ids[pairs], ids[crowded])

    def collect_findings(self, layout: str, near: near_duplicates.NearDuplicates) -> None:
        """Create table `finding`: each object that a person should review, with finding and detail."""
        self._sql.register("near", pa.table({"a": near.pairs[:, 0], "b": near.pairs[:, 1]}))
        self._sql.register("crowded", pa.table({"id": near.crowded}))
        queries = dict(FINDING_QUERIES)
        if layout == "aihub":
            queries["photograph_without_label"] = "select id, stem from photo where not has_label_file"
        self._sql.execute("create table finding (id bigint, finding varchar, detail varchar)")
        for word, query in queries.items():
            self._sql.execute(
                f"insert into finding select id, '{word}', detail from ({query}) as q(id, detail)"
            )

    # --- groups and splits ----------------------------------------------------------------------------------

    def read_candidates(self) -> dict[str, np.ndarray]:
        """Read kept images, and their dropped copies, which also join groups; sorted by id.

        Keys are hashes, uint64; 0 is a missing key.
        """
        keys = {"content": "content", **_GROUP_KEYS}
        hashes = ", ".join(
            f"if({key} is null, 0::uint64, hash({key})) as {name}" for name, key in keys.items()
        )
        rows: dict[str, np.ndarray] = self._sql.sql(f"""
            select id, reason is null as kept, coalesce(label, 0) as label, hash is null as is_flat,
                soft_label is not null as is_soft,
                case part when 'Training' then 1 when 'Validation' then 2 else 0 end::int8 as part, {hashes}
            from photo where reason is null or reason = 'duplicate_content' order by id
        """).fetchnumpy()
        return rows

    def fingerprint(self) -> str:
        """Compute `fingerprints.fingerprint` of the kept images in constant memory."""
        rows = self._sql.sql("select sha256, label, soft_label, split, fold from kept")
        return fingerprint(rows.to_arrow_reader(_ROWS_WRITTEN))

    def describe_symptoms(self) -> dict[str, Any]:
        """Compute `fingerprints.describe_symptoms` of the kept images in constant memory."""
        rows = self._sql.sql("select sha256, labels from kept where labels is not null")
        return describe_symptoms(rows.to_arrow_reader(_ROWS_WRITTEN))

    def assign_splits(self, assigned: pa.Table, keys: tuple[str, ...]) -> None:
        """Create table `kept` from `id, component, split, fold`; others than SPLITS are dropped."""
        self._sql.register("assigned", assigned)
        self._sql.execute("""
            update photo set reason = 'official_overlap', detail = 'its group is in Validation too'
            from assigned where photo.id = assigned.id and reason is null and assigned.split = 'overlap'
        """)
        self._sql.execute("""
            update photo set reason = 'held_out_group', detail = 'its group is in val or test of the data'
            from assigned where photo.id = assigned.id and reason is null and assigned.split = 'held_out'
        """)
        self._sql.execute("""
            update photo set reason = 'readers_differ',
                detail = 'its group is in val or test, whose labels are not soft'
            from assigned where photo.id = assigned.id and reason is null and assigned.split = 'not_soft'
        """)
        first = ", ".join(
            f"min({key})" for name, key in _GROUP_KEYS.items() if name == "given_group" or name in keys
        )
        self._sql.execute(f"""
            create table kept as
            with named as (
                select component, coalesce({first}, min(substr(sha256, 1, {manifest.ID_DIGITS}))) as "group"
                from photo join assigned using (id) group by component
            )
            select substr(sha256, 1, {manifest.ID_DIGITS}) as image_id, uri, member, sha256, width, height,
                if(soft_label is null, label, null) as label, soft_label, labels, site, device, captured_at,
                position, known_sex as sex, known_age as age,
                "group", cast(fold as tinyint) as fold, split, part as source_note,
                byte_offset, byte_length, compression, photo.id, component
            from photo join assigned using (id) join named using (component)
            where reason is null
        """)
        self._keep_extended()

    def add_joints(self, ids: np.ndarray, images: np.ndarray, joined: np.ndarray) -> None:
        """Add images that join no groups, because they are in too many, to the findings."""
        self._sql.register("joints", pa.table({"id": ids, "images": images, "joined": joined}))
        self._sql.execute("""
            insert into finding
            select id, 'joins_many_groups', images || ' images in ' || joined || ' groups' from joints
        """)

    # --- outputs --------------------------------------------------------------------------------------------

    def write_outputs(self, out: str) -> None:
        """Write the manifest, `dropped.parquet` and `findings.parquet`."""
        columns = ", ".join(f'"{name}"' for name in manifest.SCHEMA.names)
        rows = self._stream(f"select {columns} from kept order by split, image_id", manifest.SCHEMA)
        manifest.write_manifest(out, rows)
        dropped = self._stream(
            "select uri, member, reason, detail from photo where reason is not null union all "
            "select uri, member, code, error from object where kind in ('archive', 'other') "
            "and code is not null order by all",
            pa.schema([(name, pa.string()) for name in ("uri", "member", "reason", "detail")]),
        )
        parquet.write_batches(storage.join(out, DROPPED_FILE), dropped)
        findings = self._stream(
            "select finding, uri, member, detail from finding join object using (id) order by all",
            pa.schema([(name, pa.string()) for name in ("finding", "uri", "member", "detail")]),
        )
        parquet.write_batches(storage.join(out, FINDINGS_FILE), findings)

    def _stream(self, query: str, schema: pa.Schema) -> pa.RecordBatchReader:
        # Sorted into a table first: the sort of a streamed result cannot spill (DuckDB 2.0).
        self._sql.execute(f"create or replace temp table sorted as {query}")
        reader = self._sql.sql("from sorted").to_arrow_reader(_ROWS_WRITTEN)
        return pa.RecordBatchReader.from_batches(schema, (batch.cast(schema) for batch in reader))
