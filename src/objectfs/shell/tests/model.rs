//! Random operations, compared with a tree in memory after each few of them, through the same mount and a fresh one.

use std::collections::BTreeMap;

use super::*;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Thing {
    Directory(u32),
    File(u32, Vec<u8>),
    Link(String),
}

/// Paths to things; the root is not among them.
#[derive(Default)]
struct Model(BTreeMap<String, Thing>);

impl Model {
    fn parent_is_directory(&self, path: &str) -> Answer<()> {
        match path.rsplit_once('/') {
            None => Ok(()),
            Some((parent, _)) => match self.0.get(parent) {
                Some(Thing::Directory(_)) => Ok(()),
                _ => Err(Errno::NOENT),
            },
        }
    }

    fn is_empty(&self, path: &str) -> bool {
        !self.0.keys().any(|key| key.starts_with(&format!("{path}/")))
    }

    fn save(&mut self, path: &str, text: &[u8]) -> Answer<()> {
        self.parent_is_directory(path)?;
        match self.0.get_mut(path) {
            Some(Thing::Directory(_)) => Err(Errno::ISDIR),
            Some(Thing::Link(_)) => Err(Errno::LOOP),
            Some(Thing::File(_, bytes)) => {
                *bytes = text.to_vec();
                Ok(())
            }
            None => {
                self.0.insert(path.to_owned(), Thing::File(0o644, text.to_vec()));
                Ok(())
            }
        }
    }

    fn write_at(&mut self, path: &str, at: usize, text: &[u8]) -> Answer<()> {
        match self.0.get_mut(path) {
            Some(Thing::File(_, bytes)) => {
                if bytes.len() < at + text.len() {
                    bytes.resize(at + text.len(), 0);
                }
                bytes[at..at + text.len()].copy_from_slice(text);
                Ok(())
            }
            _ => Err(Errno::NOENT),
        }
    }

    fn add(&mut self, path: &str, thing: Thing) -> Answer<()> {
        self.parent_is_directory(path)?;
        if self.0.contains_key(path) {
            return Err(Errno::EXIST);
        }
        self.0.insert(path.to_owned(), thing);
        Ok(())
    }

    fn unlink(&mut self, path: &str) -> Answer<()> {
        match self.0.get(path) {
            None => Err(Errno::NOENT),
            Some(Thing::Directory(_)) => Err(Errno::ISDIR),
            Some(_) => {
                self.0.remove(path);
                Ok(())
            }
        }
    }

    fn rmdir(&mut self, path: &str) -> Answer<()> {
        match self.0.get(path) {
            None => Err(Errno::NOENT),
            Some(Thing::Directory(_)) if self.is_empty(path) => {
                self.0.remove(path);
                Ok(())
            }
            Some(Thing::Directory(_)) => Err(Errno::NOTEMPTY),
            Some(_) => Err(Errno::NOTDIR),
        }
    }

    fn rename(&mut self, from: &str, to: &str) -> Answer<()> {
        self.parent_is_directory(from)?;
        self.parent_is_directory(to)?;
        let thing = self.0.get(from).ok_or(Errno::NOENT)?.clone();
        let directory = matches!(thing, Thing::Directory(_));
        if directory && to.starts_with(&format!("{from}/")) {
            return Err(Errno::INVAL);
        }
        if from == to {
            return Ok(());
        }
        match self.0.get(to) {
            Some(Thing::Directory(_)) if !directory => return Err(Errno::ISDIR),
            Some(Thing::Directory(_)) if !self.is_empty(to) => return Err(Errno::NOTEMPTY),
            Some(Thing::File(..) | Thing::Link(_)) if directory => return Err(Errno::NOTDIR),
            _ => {}
        }
        let below = format!("{from}/");
        let moved: Vec<String> = self.0.keys().filter(|key| *key == from || key.starts_with(&below)).cloned().collect();
        for key in moved {
            let thing = self.0.remove(&key).unwrap();
            self.0.insert(format!("{to}{}", &key[from.len()..]), thing);
        }
        Ok(())
    }

    fn chmod(&mut self, path: &str, bits: u32) -> Answer<()> {
        match self.0.get_mut(path) {
            Some(Thing::Directory(mode) | Thing::File(mode, _)) => {
                *mode = bits;
                Ok(())
            }
            _ => Err(Errno::NOENT),
        }
    }
}

/// What a mount shows.
async fn shown(mount: &Mount, plus: bool) -> BTreeMap<String, Thing> {
    let mut found = BTreeMap::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for entry in mount.entries(&folder, 7, plus).await.unwrap() {
            let name = entry.name.to_str().unwrap();
            let path = if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
            let attr = mount.look(&path).await.unwrap();
            if entry.kind != 0 {
                assert_eq!(entry.kind, attr.mode & 0o170_000, "{path}");
            }
            let thing = match attr.mode & 0o170_000 {
                0o040_000 => {
                    folders.push(path.clone());
                    Thing::Directory(attr.mode & 0o7777)
                }
                0o120_000 => {
                    let target = mount.fs.readlink(WHO, attr.ino).await.unwrap();
                    Thing::Link(String::from_utf8(target.to_vec()).unwrap())
                }
                _ => {
                    let bytes = mount.load(&path).await.unwrap();
                    assert_eq!(attr.size, bytes.len() as u64, "{path}");
                    Thing::File(attr.mode & 0o7777, bytes)
                }
            };
            assert!(found.insert(path.clone(), thing).is_none(), "{path} is shown twice");
        }
    }
    found
}

async fn write_at(mount: &Mount, path: &str, at: u64, text: &[u8]) -> Answer<()> {
    let open = mount.open_there(path, O_RDWR).await?;
    let written = mount.put(open, at, text).await;
    mount.close(open).await.and(written)
}

async fn run(seed: u64, consistency: Consistency, max_age: u64, steps: usize) {
    let double = Double::new();
    double.set_page(3);
    let change = |settings: &mut Settings| {
        settings.consistency = consistency;
        settings.max_age = max_age;
    };
    let mount = Mount::over(&double, change).await;
    let mut model = Model::default();
    let mut random = fastrand::Rng::with_seed(seed);
    for step in 0..steps {
        let names = ["a", "a.b", "b", "c", "d"];
        let path = |random: &mut fastrand::Rng| {
            let depth = random.usize(1..4);
            (0..depth).map(|_| names[random.usize(..names.len())]).collect::<Vec<_>>().join("/")
        };
        let (one, two) = (path(&mut random), path(&mut random));
        let text: Vec<u8> = (0..random.usize(..40)).map(|_| random.u8(..)).collect();
        let is_file = matches!(model.0.get(&one), Some(Thing::File(..)));
        let (what, expected, got) = match random.u8(..12) {
            0..3 if !matches!(model.0.get(&one), Some(Thing::Link(_) | Thing::Directory(_))) => {
                (format!("save {one}"), model.save(&one, &text), mount.save(&one, &text).await)
            }
            3 if is_file && !text.is_empty() => {
                let at = random.usize(..30);
                let expected = model.write_at(&one, at, &text);
                (format!("write {one} {at}"), expected, write_at(&mount, &one, at as u64, &text).await)
            }
            4 => {
                let expected = model.add(&one, Thing::Directory(0o755));
                (format!("mkdir {one}"), expected, mount.mkdir(&one).await)
            }
            5 => {
                let expected = model.add(&one, Thing::Link(two.clone()));
                let made = match mount.parent(&one).await {
                    Ok((parent, name)) => mount.fs.symlink(WHO, parent, name, OsStr::new(&two)).await.map(|_| ()),
                    Err(errno) => Err(errno),
                };
                (format!("symlink {one}"), expected, made)
            }
            6 => (format!("unlink {one}"), model.unlink(&one), mount.unlink(&one).await),
            7 => (format!("rmdir {one}"), model.rmdir(&one), mount.rmdir(&one).await),
            8 | 9 => (format!("rename {one} {two}"), model.rename(&one, &two), mount.rename(&one, &two).await),
            10 if model.0.contains_key(&one) && !matches!(model.0.get(&one), Some(Thing::Link(_))) => {
                let bits = random.u32(..0o1000);
                let change = SetAttr { mode: Some(bits), ..SetAttr::default() };
                (format!("chmod {one}"), model.chmod(&one, bits), mount.set(&one, change).await.map(|_| ()))
            }
            11 if is_file => {
                let size = random.usize(..50);
                if let Some(Thing::File(_, bytes)) = model.0.get_mut(&one) {
                    bytes.resize(size, 0);
                }
                let change = SetAttr { size: Some(size as u64), ..SetAttr::default() };
                (format!("truncate {one}"), Ok(()), mount.set(&one, change).await.map(|_| ()))
            }
            _ => continue,
        };
        // Which of several reasons is given may differ: a path through a file, say.
        assert_eq!(got.is_ok(), expected.is_ok(), "seed {seed} step {step}: {what}: {got:?}, not {expected:?}");
        if step % 10 == 9 {
            assert_eq!(shown(&mount, random.bool()).await, model.0, "seed {seed} step {step} after {what}");
        }
    }
    mount.fs.ended().await;
    let fresh = Mount::over(&double, change).await;
    assert_eq!(shown(&fresh, true).await, model.0, "seed {seed}: through a fresh mount");
    let left: Vec<_> =
        double.keys().into_iter().filter(|key| key.contains("unlinked/") || key.contains("renames/")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn random_operations_do_what_a_tree_in_memory_does() {
    for seed in 0..12 {
        run(seed, Consistency::Strict, 600_000, 150).await;
    }
}

#[tokio::test]
async fn random_operations_are_right_without_any_trust_in_what_is_known() {
    for seed in 100..106 {
        run(seed, Consistency::Strict, 0, 120).await;
    }
}

#[tokio::test]
async fn random_operations_are_right_with_write_back() {
    for seed in 200..208 {
        run(seed, Consistency::WriteBack, 600_000, 150).await;
    }
}
