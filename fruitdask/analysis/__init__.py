"""Statistics of stored features and findings: reduction, neighbours, quality, duplicates, differences."""
