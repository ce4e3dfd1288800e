"""From a file's bytes to the pixels and statistics that the model takes."""
