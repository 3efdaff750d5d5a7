"""What a person looks at: plots, files for other programs, the report page."""
