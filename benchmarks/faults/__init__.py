"""Faults planted in converted files, to show that `handheld check` catches and locates what converters get wrong."""
