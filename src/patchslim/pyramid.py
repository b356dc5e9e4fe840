"""Placeholder."""


def figure(record):
    return "<svg/>"
