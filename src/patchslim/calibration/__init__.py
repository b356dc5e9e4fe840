"""Fits a method to unlabelled images."""
