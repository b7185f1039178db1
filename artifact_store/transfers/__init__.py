"""Whole trees of files: push a folder as one package, pull a package into a folder.

Works on any `Registry`: a `Client`, or a registry on local parts. Of `client`, it only imports the sources of bodies in
`client/bodies.py`. Start reading at `push.py`.
"""
