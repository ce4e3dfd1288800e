"""Queries of the findings: each selects the id of an object and a detail, from the tables of an audit."""

FINDING_QUERIES = {
    "label_without_photograph": "select id, stem from object anti join photo using (stem) "
    "where kind = 'label'",
    "meta_without_photograph": "select id, stem from object anti join photo using (stem) where kind = 'meta'",
    "bad_label_file": "select id, error from object where kind = 'label' and code is not null",
    "bad_meta_file": "select id, error from object where kind = 'meta' and code is not null",
    "label_files_differ": "select id, stem from object where kind = 'label' "
    "and stem in (select stem from truth where answers > 1)",
    "folder_and_label_file_differ": "select id, 'folder ' || folder_grade || ', label file ' || "
    "labels[symptom + 1] from photo where folder_grade <> labels[symptom + 1]",
    "content_in_several_symptoms": "select id, sha256 from photo join repeated using (content) "
    "where in_several_symptoms",
    "content_in_both_parts": "select id, sha256 from photo join repeated using (content) where in_both_parts",
    "conflicting_contents": "select id, sha256 from photo where reason = 'conflicting_labels' "
    "and detail like 'sha256 %'",
    "grades_of_copies_differ": "select id, sha256 from photo join joined using (content) "
    "join repeated using (content) where differ and not conflicting "
    "and (reason is null or reason = 'duplicate_content')",
    "same_name_other_content": "select id, stem from photo where content is not null and stem in "
    "(select any_value(stem) from photo group by md5_number(stem) "
    "having min(content) <> max(content))",
    "flat_image": "select id, sha256 from photo where content is not null and hash is null",
    "crowded_hash": "select id, null from crowded",
    "near_duplicate": "select b as id, object.uri || coalesce('!' || object.member, '') "
    "from near join object on object.id = near.a",
    "near_duplicate_labels_differ": "select near.b as id, 'labels ' || "
    "least(one.label, other.label) || ' and ' || greatest(one.label, other.label) "
    "from near join photo one on one.id = near.a join photo other on other.id = near.b "
    "where one.label <> other.label",
}
"""Query by the name of the finding (`findings.FINDINGS`), over the tables of `queries.AuditTables`."""
