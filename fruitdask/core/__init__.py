"""What every room needs: settings, storage, listings, words."""
