"""The Helm chart, checked as an operator's tools see it: linted, rendered, validated; no cluster is needed."""
