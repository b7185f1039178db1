"""Random faults under load on the whole product with real services, then the oracle: `make torture`."""
