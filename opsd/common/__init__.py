"""Utilities for every room: errors, the display, files, statistics, templates, worker processes.

These modules import no other room of `opsd`. Import each name from the module that defines it.
"""
