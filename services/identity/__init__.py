"""Who sends a request, and what they may do: this package checks tokens and turns them into principals of
`services.core.access`.

`Authenticator` is the interface: an `Authorization` header goes in, a `Principal` comes out. `policy` reads the policy
file, `static_tokens` the file of static tokens, `oidc` checks tokens of issuers, and `audit` records who did what.
Start reading at `authenticator.py`.
"""
