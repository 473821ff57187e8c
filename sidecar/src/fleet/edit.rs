//! Changes to an inventory's text that leave everything else as its author wrote it.

use toml_edit::{DocumentMut, TableLike, Value};

use crate::terms::PublicKey;

/// Why an inventory was left alone.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    #[error("not TOML")]
    Syntax(#[from] toml_edit::TomlError),
    #[error("no [[node]] is named {0}")]
    NoNode(String),
}

/// The text with this public key for this node.
pub fn set_public_key(text: &str, name: &str, key: PublicKey) -> Result<String, EditError> {
    let mut document: DocumentMut = text.parse()?;
    let node = document.get_mut("node").and_then(|nodes| node(nodes, name));
    let node = node.ok_or_else(|| EditError::NoNode(name.to_owned()))?;
    let key = key.to_string();
    match node.get_mut("public_key").and_then(toml_edit::Item::as_value_mut) {
        Some(old) => {
            // With the comment behind it.
            let decor = old.decor().clone();
            *old = Value::from(key);
            *old.decor_mut() = decor;
        }
        None => {
            node.insert("public_key", toml_edit::value(key));
        }
    }
    Ok(document.to_string())
}

/// As `[[node]]`, or as an element of `node = [..]`.
fn node<'d>(nodes: &'d mut toml_edit::Item, name: &str) -> Option<&'d mut dyn TableLike> {
    fn is(table: &dyn TableLike, name: &str) -> bool {
        table.get("name").and_then(toml_edit::Item::as_str) == Some(name)
    }
    if nodes.is_array_of_tables() {
        let tables = nodes.as_array_of_tables_mut()?;
        return tables.iter_mut().find(|table| is(*table, name)).map(|table| table as &mut dyn TableLike);
    }
    let tables = nodes.as_array_mut()?.iter_mut().filter_map(Value::as_inline_table_mut);
    tables.map(|table| table as &mut dyn TableLike).find(|table| is(*table, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_set_and_everything_else_stays() {
        let key = PublicKey([7; 32]);
        let text = "# All of them.\n[[node]] # first\nname='a'\n\n[node.ssh]\nport = 22 # odd\n\n[[node]]\nname = \"b\"\npublic_key = \"old\" # since May\n";
        let with = |name: &str| set_public_key(text, name, key).expect("set");
        assert_eq!(with("a"), text.replace("name='a'\n", &format!("name='a'\npublic_key = \"{key}\"\n")));
        assert_eq!(with("b"), text.replace("\"old\"", &format!("\"{key}\"")));
        let inline = "node = [{ name = \"a\" }, { name = \"b\", public_key = \"old\" }]\n";
        assert_eq!(set_public_key(inline, "b", key).expect("set"), inline.replace("old", &key.to_string()));
        assert!(matches!(set_public_key(text, "c", key), Err(EditError::NoNode(_))));
    }
}
