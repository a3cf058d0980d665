"""Other systems that distopt's algorithms run in: one package each, imported by name, never by `import distopt`."""
