"""What gateway and client say to each other over HTTP: JSON documents, problem details, headers, paths and times.

Each document is written and read in one place, so that both sides agree. Imports the modules beside this folder, and
neither `client` nor `transfers`. Start reading at `shapes.py`.
"""
