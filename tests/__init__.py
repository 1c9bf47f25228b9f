"""The tests. Helpers are in tests.support; no test file imports another, and bench imports none of
this."""
