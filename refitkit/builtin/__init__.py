"""Built-in plugins. They use only the public plugin API, as a third-party plugin does."""
