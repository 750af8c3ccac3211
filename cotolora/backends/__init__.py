"""The backends that compute a call, and the choice between them."""
