//! Code that the agent runs in a kernel around a client's: variables, the working directory. Each language quotes for itself, so that
//! no value can end a string (contract: envd.md section 7.5, weakness 33 in section 11).

use std::collections::BTreeMap;
use std::path::Path;

use super::spec::Dialect;

/// Where what a cell's variables replaced is kept in the kernel, out of the sight of its code.
const KEPT: &str = "_guestd_replaced";

/// What to change for good; None removes.
pub type Change = BTreeMap<String, Option<String>>;

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// A string of Python or JavaScript: a JSON string is one in both, but for two line separators in old JavaScript.
fn literal(text: &str) -> String {
    json(&text).replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029")
}

/// Runs in a name space of its own: nothing of it is seen by the code of cells, and nothing of theirs is used.
fn python(program: &str, given: &str) -> String {
    format!("__import__('builtins').exec({}, {{'given': {}}})", literal(program), literal(given))
}

fn script(program: &str, given: &str) -> String {
    format!("{{ const given = JSON.parse({}); {program} }}", literal(given))
}

/// A word of bash, on one line.
fn word(text: &str) -> String {
    let mut quoted = "$'".to_owned();
    for c in text.chars() {
        match c {
            '\\' => quoted.push_str("\\\\"),
            '\'' => quoted.push_str("\\'"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_ascii_control() => quoted.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('\'');
    quoted
}

/// Whether bash can have a variable of that name.
fn is_shell_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Why a cell cannot have a variable; None when it can.
pub fn refusal(dialect: Dialect, variables: &BTreeMap<String, String>) -> Option<String> {
    for (name, value) in variables {
        if name.is_empty() || name.contains('=') || name.contains('\0') || value.contains('\0') {
            return Some(format!(
                "env_vars: {name:?}: a name is not empty and has no '=', and neither name nor value has a NUL"
            ));
        }
        if dialect == Dialect::Bash && !is_shell_name(name) {
            return Some(format!("env_vars: {name:?} is no name of a variable in bash"));
        }
    }
    (dialect == Dialect::Other && !variables.is_empty())
        .then(|| "env_vars: only kernels of python, javascript, typescript and bash can be given variables for one cell".to_owned())
}

/// Changes variables for good; None when there is nothing to do or the kernel cannot.
pub fn change(dialect: Dialect, changes: &Change) -> Option<String> {
    if changes.is_empty() {
        return None;
    }
    match dialect {
        Dialect::Python => Some(python(
            "import os, json\nfor name, value in json.loads(given).items():\n os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)\n",
            &json(changes),
        )),
        Dialect::Script => Some(script(
            "for (const [name, value] of Object.entries(given)) { value === null ? Deno.env.delete(name) : Deno.env.set(name, value) }",
            &json(changes),
        )),
        Dialect::Bash => {
            let each =
                changes.iter().filter(|(name, _)| is_shell_name(name)).map(|(name, value)| match value {
                    Some(value) => format!("export {name}={}", word(value)),
                    None => format!("unset {name}"),
                });
            Some(each.collect::<Vec<_>>().join("; ")).filter(|code| !code.is_empty())
        }
        Dialect::Other => None,
    }
}

/// Sets the variables of one cell and keeps what they replace.
pub fn set(dialect: Dialect, variables: &BTreeMap<String, String>) -> Option<String> {
    if variables.is_empty() {
        return None;
    }
    match dialect {
        Dialect::Python => Some(python(
            &format!(
                "import os, json\ngiven = json.loads(given)\nos.{KEPT} = {{name: os.environ.get(name) for name in given}}\nos.environ.update(given)\n"
            ),
            &json(variables),
        )),
        Dialect::Script => Some(script(
            &format!(
                "const kept = {{}}; for (const [name, value] of Object.entries(given)) {{ kept[name] = Deno.env.get(name); Deno.env.set(name, value) }} Object.defineProperty(globalThis, Symbol.for(\"{KEPT}\"), {{ value: kept, configurable: true }});"
            ),
            &json(variables),
        )),
        Dialect::Bash => {
            let each = variables.iter().map(|(name, value)| {
                format!(
                    "if [ \"${{{name}+x}}\" ]; then {KEPT}_{name}=\"${name}\"; fi; export {name}={}",
                    word(value)
                )
            });
            Some(each.collect::<Vec<_>>().join("; "))
        }
        Dialect::Other => None,
    }
}

/// Puts back what [`set`] replaced.
pub fn restore(dialect: Dialect, variables: &BTreeMap<String, String>) -> Option<String> {
    if variables.is_empty() {
        return None;
    }
    match dialect {
        Dialect::Python => Some(python(
            &format!(
                "import os\nfor name, value in os.__dict__.pop('{KEPT}', {{}}).items():\n os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)\n"
            ),
            "",
        )),
        Dialect::Script => Some(script(
            &format!(
                "const key = Symbol.for(\"{KEPT}\"); for (const [name, value] of Object.entries(globalThis[key] ?? given)) {{ value === undefined ? Deno.env.delete(name) : Deno.env.set(name, value) }} delete globalThis[key];"
            ),
            "{}",
        )),
        Dialect::Bash => {
            let each = variables.keys().map(|name| {
                format!(
                    "if [ \"${{{KEPT}_{name}+x}}\" ]; then export {name}=\"${KEPT}_{name}\"; unset {KEPT}_{name}; else unset {name}; fi"
                )
            });
            Some(each.collect::<Vec<_>>().join("; "))
        }
        Dialect::Other => None,
    }
}

/// What a new kernel is told before its first cell: to keep what it has said until it is read. By default its socket keeps 1,000 messages and drops
/// the rest without a word (zmq_setsockopt(3), ZMQ_SNDHWM).
pub fn prepare(dialect: Dialect) -> Option<String> {
    let program =
        "import zmq, IPython\nIPython.get_ipython().kernel.iopub_thread.socket.setsockopt(zmq.SNDHWM, 0)\n";
    (dialect == Dialect::Python).then(|| python(program, ""))
}

/// Goes to a directory.
pub fn enter(dialect: Dialect, directory: &Path) -> Option<String> {
    let directory = directory.to_string_lossy();
    match dialect {
        Dialect::Python => Some(python("import os\nos.chdir(given)\n", &directory)),
        Dialect::Script => Some(format!("Deno.chdir({});", literal(&directory))),
        Dialect::Bash => Some(format!("cd {}", word(&directory))),
        Dialect::Other => None,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const HOSTILE: &str = "a'b\"c\\d$HOME `id` \n\t\u{1}ü€😀\u{2028} !x \"\"\" ${A} %";

    fn variables() -> BTreeMap<String, String> {
        BTreeMap::from([("A".to_owned(), HOSTILE.to_owned()), ("B".to_owned(), String::new())])
    }

    fn output(program: &str, arguments: &[&str]) -> String {
        let ran = Command::new(program).args(arguments).env("B", "before").env_remove("A").output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).unwrap()
    }

    #[test]
    fn no_value_ends_its_string_in_python() {
        let show = "import os; print(ascii([os.environ.get('A'), os.environ.get('B')]))";
        let of = |dialect| (set(dialect, &variables()).unwrap(), restore(dialect, &variables()).unwrap());
        let (set, restore) = of(Dialect::Python);
        let program = format!("{set}\n{show}\n{restore}\n{show}\nprint([n for n in dir() if 'given' in n])");
        let printed = output("python3", &["-c", &program]);
        let expected = output("python3", &["-c", &format!("print(ascii([{}, '']))", literal(HOSTILE))]);
        assert_eq!(printed, format!("{expected}[None, 'before']\n[]\n"));
    }

    #[test]
    fn no_value_ends_its_word_in_bash() {
        let show = "printf '%s|%s|' \"${A-none}\" \"${B-none}\"";
        let (set, restore) =
            (set(Dialect::Bash, &variables()).unwrap(), restore(Dialect::Bash, &variables()).unwrap());
        assert!(!set.contains('\n'));
        let printed = output("bash", &["-c", &format!("{set}; {show}; {restore}; {show}")]);
        assert_eq!(printed, format!("{HOSTILE}||none|before|"));
        let change =
            change(Dialect::Bash, &Change::from([("A".into(), Some(HOSTILE.into())), ("B".into(), None)]))
                .unwrap();
        assert_eq!(output("bash", &["-c", &format!("{change}; {show}")]), format!("{HOSTILE}|none|"));
    }

    #[test]
    fn a_variable_that_cannot_be_is_refused_with_its_name() {
        let of = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
        assert!(refusal(Dialect::Python, &of("", "x")).is_some());
        assert!(refusal(Dialect::Python, &of("A=B", "x")).is_some());
        assert!(refusal(Dialect::Python, &of("A", "\0")).unwrap().contains("\"A\""));
        assert!(refusal(Dialect::Bash, &of("a-b", "x")).is_some());
        assert!(refusal(Dialect::Python, &of("a-b", "x")).is_none());
        assert!(refusal(Dialect::Other, &of("A", "x")).is_some());
        assert!(refusal(Dialect::Other, &BTreeMap::new()).is_none());
    }

    #[test]
    fn a_directory_is_entered_whatever_it_is_called() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("it's \"a\" $HOME");
        std::fs::create_dir(&folder).unwrap();
        let code = enter(Dialect::Bash, &folder).unwrap();
        assert_eq!(output("bash", &["-c", &format!("{code}; pwd -P")]).trim_end(), folder.to_str().unwrap());
        let code = enter(Dialect::Python, &folder).unwrap();
        let printed = output("python3", &["-c", &format!("{code}\nimport os; print(os.getcwd())")]);
        assert_eq!(printed.trim_end(), folder.to_str().unwrap());
    }
}
