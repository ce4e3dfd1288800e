"""Connections and requests below the routes: problems, limits, streaming, multipart."""
