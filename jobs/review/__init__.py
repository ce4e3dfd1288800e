"""`scalp review`: a web page on which people answer the images that the model refers."""
