"""What the tests share: tiny models, files and folders, and what runs in processes of their own."""
