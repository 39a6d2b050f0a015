"""Pages that figures are drawn for: `page` says their width and letters."""
