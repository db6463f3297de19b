"""Recipes, suites, and the lock that keeps published versions as they are."""
