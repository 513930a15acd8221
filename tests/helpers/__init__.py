"""Shared by several tests: tiny models, cases, stand-ins and dense references."""
