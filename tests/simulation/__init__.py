"""The Kafka side of the product in one process: real writers, routers and readers on a model of Kafka, with a seed.

`scheduler` has virtual time and threads; `kafka` the model of a cluster, `clients` the client library on it;
`processes` the product's processes, `workload` and `faults` what happens to them; `checker` compares the promises with
what happened; `mutations` are mistakes that must be found. Begin with `simulation`. It may import everything.
docs/simulation.md says what is modelled.
"""
