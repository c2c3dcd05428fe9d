"""Built-in plugins. They use only what a third party may use."""
