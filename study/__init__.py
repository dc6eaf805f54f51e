"""What is measured on whole models: accuracy, and what a diff finds. See the packages in it."""
