"""Where images and labels are stored, and the manifest that lists them."""
