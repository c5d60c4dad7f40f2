"""The app that Flower ships."""
