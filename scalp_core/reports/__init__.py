"""HTML reports: one self-contained file each, in English and Korean, without scripts."""
