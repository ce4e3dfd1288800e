"""The HTTP interface: routes, schemas, middleware, OpenAPI, page."""
