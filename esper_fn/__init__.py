"""Esper-fn: networks that grow while they train."""
