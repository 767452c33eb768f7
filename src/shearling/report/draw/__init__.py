"""Tables, plots and markup."""
