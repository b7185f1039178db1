"""The language of gateway and client over HTTP: JSON documents, problem details, headers, paths and times.

Each document is written and read in one place, so that both sides agree. Imports the modules beside this folder, but
neither `client` nor `transfers`. Start reading at `shapes.py`.
"""
