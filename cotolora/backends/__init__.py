"""How a call is computed: types, the choice of a backend, and the backends."""
