"""Decides: checkpoint → plan → placement → registry → gateway."""
