"""Holds the demonstration behind `esper grow`: data sets, hosts, and jobs that compare growth.

The library does not depend on it. Its three rooms are imported one by one: `esper_fn.demo.data`
(which needs no JAX), `esper_fn.demo.hosts` and `esper_fn.demo.jobs`.
"""
