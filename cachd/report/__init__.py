"""What cachd says about its models: to the API, to the command line, and to pods in status files."""
