"""Names of the reasons and findings in dropped.parquet and findings.parquet, with their meanings."""

REASONS = {
    "not_in_a_grade_folder": "none of its folders names a grade",
    "other_symptom": "its folder is of another symptom",
    "no_label": "no label file has its name, or its row in the table has no label",
    "bad_label": "its label file does not hold six grades, or its label is not a grade",
    "conflicting_labels": "the same content, name or row of a table has different labels",
    "duplicate_content": "another image with the same bytes is kept",
    "held_out_group": "its group is in the val or test split of the extended data",
    "official_overlap": "its session or a copy of it is in the delivered Validation split",
}
"""Reasons to drop an image, in addition to errors.IMAGE_CODES and scan.OBJECT_CODES."""

FINDINGS = {
    "photograph_without_label": "images without a label file of the same name",
    "label_without_photograph": "label files without an image of the same name",
    "meta_without_photograph": "META files without an image of the same name",
    "bad_label_file": "label files that do not hold six grades",
    "bad_meta_file": "META files that cannot be read",
    "label_files_differ": "names whose label files contradict each other",
    "folder_and_label_file_differ": "images whose folder and label file have different grades",
    "content_in_several_symptoms": "contents that are in folders of more than one symptom",
    "content_in_both_parts": "contents that are in both Training and Validation",
    "conflicting_contents": "contents that have more than one label",
    "grades_of_copies_differ": "contents whose copies have different grades of another symptom, which are "
    "therefore unknown",
    "same_name_other_content": "names that several contents share",
    "near_duplicate": "pairs of different files that show the same image",
    "near_duplicate_labels_differ": "of these, pairs whose labels differ",
    "flat_image": "images of one color, which join no groups",
    "joins_many_groups": "images that are the same in more than 3 microscopes, sessions or groups of a "
    "table, and therefore join none",
    "crowded_hash": "images that look like so many others that not all were compared",
}
"""Findings that a person should review, by name."""
