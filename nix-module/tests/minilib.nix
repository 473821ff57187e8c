# As much of nixpkgs' lib as the module and the stubs use, for evaluation where there is no nixpkgs.
# It must give what the real one gives; the tests compare the two wherever the real one is at hand.
let
  inherit (builtins)
    all
    attrNames
    attrValues
    concatLists
    concatMap
    concatStringsSep
    elem
    elemAt
    filter
    foldl'
    functionArgs
    genList
    head
    isAttrs
    isBool
    isFloat
    isFunction
    isInt
    isList
    isPath
    isString
    length
    listToAttrs
    map
    mapAttrs
    match
    removeAttrs
    replaceStrings
    stringLength
    substring
    tail
    ;

  # Lists, sets and strings.
  any = builtins.any;
  id = x: x;
  optional = condition: x: if condition then [ x ] else [ ];
  optionals = condition: list: if condition then list else [ ];
  optionalAttrs = condition: set: if condition then set else { };
  optionalString = condition: text: if condition then text else "";
  last = list: elemAt list (length list - 1);
  unique = foldl' (acc: x: if elem x acc then acc else acc ++ [ x ]) [ ];
  subtractLists = without: filter (x: !(elem x without));
  remove = x: filter (y: y != x);
  count = test: list: length (filter test list);
  reverse = list: genList (n: elemAt list (length list - 1 - n)) (length list);
  imap1 = f: list: genList (n: f (n + 1) (elemAt list n)) (length list);
  nameValuePair = name: value: { inherit name value; };
  filterAttrs =
    test: set: removeAttrs set (filter (name: !(test name set.${name})) (attrNames set));
  mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
  mapAttrs' = f: set: listToAttrs (mapAttrsToList f set);
  genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
  zipAttrsWith =
    f: sets:
    genAttrs (unique (concatMap attrNames sets)) (
      name: f name (concatMap (set: optional (set ? ${name}) set.${name}) sets)
    );
  recursiveUpdate =
    a: b:
    a
    // mapAttrs (
      name: value:
      if a ? ${name} && isAttrs a.${name} && isAttrs value then recursiveUpdate a.${name} value else value
    ) b;
  setAttrByPath =
    path: value: if path == [ ] then value else { ${head path} = setAttrByPath (tail path) value; };
  concatMapStrings = f: list: concatStringsSep "" (map f list);
  concatMapStringsSep =
    separator: f: list:
    concatStringsSep separator (map f list);
  hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
  hasSuffix =
    suffix: text:
    let
      n = stringLength text - stringLength suffix;
    in
    n >= 0 && substring n (-1) text == suffix;
  hasInfix = infix: text: length (splitString infix text) > 1;
  removePrefix =
    prefix: text: if hasPrefix prefix text then substring (stringLength prefix) (-1) text else text;
  removeSuffix =
    suffix: text:
    if hasSuffix suffix text then substring 0 (stringLength text - stringLength suffix) text else text;
  splitString = separator: text: filter isString (builtins.split (escape separator) text);
  escape = replaceStrings [ "." "*" "+" "?" "[" "]" "(" ")" "|" "\\" "^" "$" "{" "}" ] (
    map (c: "\\" + c) [ "." "*" "+" "?" "[" "]" "(" ")" "|" "\\" "^" "$" "{" "}" ]
  );
  getExe' = package: name: "${package}/bin/${name}";
  literalExpression = text: {
    _type = "literalExpression";
    inherit text;
  };

  # Properties of definitions.
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  kind = value: if isAttrs value then value._type or null else null;
  # Down to the attributes, whose names must be known before any condition is.
  push =
    value:
    if kind value == "merge" then
      concatMap push value.contents
    else if kind value == "if" then
      map (mapAttrs (_: mkIf value.condition)) (push value.content)
    else if kind value == "override" then
      map (mapAttrs (_: mkOverride value.priority)) (push value.content)
    else
      [ value ];
  discharge =
    priority: value:
    if kind value == "merge" then
      concatMap (discharge priority) value.contents
    else if kind value == "if" then
      optionals value.condition (discharge priority value.content)
    else if kind value == "override" then
      discharge value.priority value.content
    else
      [ { inherit priority value; } ];

  showOption = concatStringsSep ".";
  mergeDefinitions =
    loc: type: defs:
    let
      found = concatMap (discharge 100) defs;
      strongest = foldl' (p: def: if def.priority < p then def.priority else p) 9999 found;
      values = map (def: def.value) (filter (def: def.priority == strongest) found);
      wrong = filter (value: !(type.check value)) values;
    in
    {
      defined = values != [ ];
      value =
        if wrong != [ ] then
          throw "A definition for option `${showOption loc}' is not of type `${type.description}'."
        else if values == [ ] then
          type.empty or (throw "The option `${showOption loc}' was accessed but has no value defined.")
        else
          type.merge loc values;
    };

  # Types.
  one =
    loc: values:
    if all (value: value == head values) values then
      head values
    else
      throw "The option `${showOption loc}' has conflicting definition values.";
  plain = description: check: {
    inherit description check;
    merge = one;
  };
  types = rec {
    anything = plain "anything" (_: true) // {
      merge =
        loc: values:
        if all isAttrs values then foldl' recursiveUpdate { } values else one loc values;
    };
    raw = plain "raw value" (_: true);
    bool = plain "boolean" isBool;
    int = plain "signed integer" isInt;
    float = plain "floating point number" isFloat;
    str = plain "string" isString;
    path = plain "absolute path" (
      value: isPath value || isString value && hasPrefix "/" value || value ? outPath
    );
    package = plain "package" (value: (value.type or null) == "derivation");
    lines = str // {
      description = "strings concatenated with \"\\n\"";
      merge = _: concatStringsSep "\n";
    };
    # Read from a file it may end in a line's end.
    singleLineStr = strMatching "[^\n\r]*\n?" // {
      merge = loc: values: removeSuffix "\n" (one loc values);
    };
    ints.between = low: high: plain "integer between ${toString low} and ${toString high} (both inclusive)" (
      value: isInt value && value >= low && value <= high
    );
    port = ints.between 0 65535;
    strMatching = pattern: plain "string matching the pattern ${pattern}" (
      value: isString value && match pattern value != null
    );
    enum = values: plain "one of ${toString values}" (value: elem value values);
    listOf = element: {
      description = "list of ${element.description}";
      check = isList;
      empty = [ ];
      merge =
        loc: lists:
        map (entry: entry.value) (
          filter (entry: entry.defined) (
            concatLists (
              imap1 (
                n:
                imap1 (
                  m: value:
                  mergeDefinitions (loc ++ [ "[definition ${toString n}-entry ${toString m}]" ]) element [
                    value
                  ]
                )
              ) lists
            )
          )
        );
      extended = other: listOf (extend element other.element);
      inherit element;
    };
    attrsOf = element: {
      description = "attribute set of ${element.description}";
      check = isAttrs;
      empty = { };
      merge =
        loc: sets:
        mapAttrs (_: entry: entry.value) (
          filterAttrs (_: entry: entry.defined) (
            zipAttrsWith (name: mergeDefinitions (loc ++ [ name ]) element) (concatMap push sets)
          )
        );
      extended = other: attrsOf (extend element other.element);
      inherit element;
    };
    nullOr =
      type:
      plain "null or ${type.description}" (value: value == null || type.check value)
      // {
        merge =
          loc: values:
          if all (value: value == null) values then
            null
          else if elem null values then
            one loc values
          else
            type.merge loc values;
      };
    either = a: b: {
      description = "${a.description} or ${b.description}";
      check = value: a.check value || b.check value;
      merge =
        loc: values:
        if all a.check values then
          a.merge loc values
        else if all b.check values then
          b.merge loc values
        else
          one loc values;
    };
    oneOf = list: foldl' either (head list) (tail list);
    submodule =
      module:
      let
        modules = if isList module then module else [ module ];
      in
      {
        description = "submodule";
        check = value: isAttrs value || isFunction value || isPath value;
        empty = { };
        merge =
          loc: values:
          (evalModules {
            modules = modules ++ map (value: if isAttrs value then { config = value; } else value) values;
            specialArgs.name = last loc;
            prefix = loc;
          }).config;
        extended = other: submodule (modules ++ other.modules);
        inherit modules;
      };
  };
  # One option that is declared twice.
  extend = type: other: if type ? extended then type.extended other else type;

  mkOption = option: option // { _type = "option"; };

  evalModules =
    {
      modules,
      specialArgs ? { },
      prefix ? [ ],
    }:
    let
      arguments = {
        inherit config lib;
      }
      // specialArgs;
      load =
        module:
        let
          source = if isPath module || isString module then import module else module;
          value =
            if isFunction source then
              source (
                if functionArgs source == { } then
                  arguments
                else
                  builtins.intersectAttrs (functionArgs source) arguments
              )
            else
              source;
          long = value ? config || value ? options;
          stray = removeAttrs value [
            "config"
            "options"
            "imports"
            "freeformType"
          ];
        in
        assert
          long -> stray == { } || throw "Module has an unsupported attribute `${head (attrNames stray)}'.";
        {
          imports = value.imports or [ ];
          options = value.options or { };
          config = if long then value.config or { } else removeAttrs value [ "imports" ];
          freeform = optional (value ? freeformType) value.freeformType;
        };
      # Level by level, and what is imported before what imports: the order of lists that are merged.
      collect =
        modules:
        let
          loaded = map load modules;
        in
        if modules == [ ] then [ ] else collect (concatMap (module: module.imports) loaded) ++ reverse loaded;
      loaded = collect modules;

      declare =
        loc: declarations:
        if any (declaration: kind declaration == "option") declarations then
          foldl' (
            a: b:
            if a ? default && b ? default then
              throw "The option `${showOption loc}' is already declared."
            else
              a // b // { type = extend a.type b.type; }
          ) (head declarations) (tail declarations)
        else
          zipAttrsWith (name: declare (loc ++ [ name ])) declarations;
      options = declare prefix (map (module: module.options) loaded);

      # { value; stray } of a node of the options' tree; `stray`: what no option takes.
      settle =
        loc: option: defs:
        if kind option == "option" then
          let
            merged = mergeDefinitions loc option.type (
              defs ++ optional (option ? default) (mkOverride 1500 option.default)
            );
          in
          {
            value = if option ? apply then option.apply merged.value else merged.value;
            stray = [ ];
          }
        else
          let
            sets = concatMap push defs;
            values = zipAttrsWith (_: id) sets;
            settled = mapAttrs (name: sub: settle (loc ++ [ name ]) sub (values.${name} or [ ])) option;
          in
          {
            value = mapAttrs (_: entry: entry.value) settled;
            stray =
              concatMap (entry: entry.stray) (attrValues settled)
              ++ concatMap (
                name:
                map (value: {
                  path = loc ++ [ name ];
                  inherit value;
                }) values.${name}
              ) (attrNames (removeAttrs values (attrNames option)));
          };
      root = settle prefix options (map (module: module.config) loaded);
      freeform = concatMap (module: module.freeform) loaded;
      below = path: genList (n: elemAt path (n + length prefix)) (length path - length prefix);
      config =
        if freeform == [ ] || root.stray == [ ] then
          root.value
        else
          recursiveUpdate (
            (head freeform).merge prefix (
              map (entry: setAttrByPath (below entry.path) entry.value) root.stray
            )
          ) root.value;
      checked =
        if freeform == [ ] && root.stray != [ ] then
          throw "The option `${showOption (head root.stray).path}' does not exist."
        else
          config;
    in
    {
      inherit options;
      config = checked;
    };

  lib = {
    inherit
      any
      attrValues
      concatMap
      concatMapStrings
      concatMapStringsSep
      concatStringsSep
      count
      evalModules
      filter
      filterAttrs
      genAttrs
      getExe'
      hasInfix
      hasPrefix
      hasSuffix
      length
      literalExpression
      mapAttrs'
      mapAttrsToList
      mkIf
      mkMerge
      mkOption
      mkOverride
      optional
      optionalAttrs
      optionalString
      optionals
      remove
      removePrefix
      removeSuffix
      splitString
      subtractLists
      types
      unique
      ;
    assertMsg = assertion: message: assertion || throw message;
    importTOML = path: builtins.fromTOML (builtins.readFile path);
    licenses.mit = "MIT";
    licenses.asl20 = "Apache-2.0";
    # Files are the build's business.
    fileset.toSource = { root, fileset }: root;
    fileset.unions = files: assert all builtins.pathExists files; files;
    mkDefault = mkOverride 1000;
    mkForce = mkOverride 50;
    mkEnableOption =
      what:
      mkOption {
        type = types.bool;
        default = false;
        description = "Whether to enable ${what}.";
      };
    mkPackageOption =
      pkgs: name: _:
      mkOption {
        type = types.package;
        default = pkgs.${name};
        defaultText = literalExpression "pkgs.${name}";
        description = "The ${name} package to use.";
      };
  };
in
lib
