"""The routes of the gateway: one module for each kind of resource, with each handler beside its declaration.

A handler takes a `Call`, asks the registry, and returns an answer. Its `Route` in `ROUTES` declares parameters, body,
answers and problems: requests are parsed by it, and `/openapi.json` is made from it. `app` lists all `ROUTES`.

May import `protocol` and `admission`. Begin with `packages`; `files` has the upload of one file.
"""
