"""What every other package of fruitdask needs: settings, storage, listings, escaping."""
