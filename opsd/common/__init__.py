"""What every room may use and none is about: errors, the display, files, statistics, templates.

These modules import no other room of `opsd`. Import from the module that has the name.
"""
