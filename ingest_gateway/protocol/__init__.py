"""HTTP for the gateway: connections, requests, answers and problems. It does not know the routes.

Begin with `request`: a `Call` is one request, read and answered. `declaration` declares routes; `parameters` has what
routes read from path, query and headers. `connections` bounds what arrives before there is a request. `negotiation`,
`codings` and `json_body` read headers and bodies, and are independent of the rest.

May import `admission`, and `gateway` for what a `Call` carries to its handler.
"""
