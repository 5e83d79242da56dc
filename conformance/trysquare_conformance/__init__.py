"""Checks the fast code against the reference on your machine: `trysquare verify`."""
