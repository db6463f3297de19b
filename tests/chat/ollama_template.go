// Executes templates as Ollama does: the same variables, by Go's own text/template.
// Reads a JSON list of cases from stdin, writes a JSON list of results to stdout.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type Message struct {
	Role     string `json:"role"`
	Content  string `json:"content"`
	Thinking string `json:"reasoning_content"`
}

type Case struct {
	Template string     `json:"template"`
	Messages []*Message `json:"messages"`
	Think    *bool      `json:"think"`
}

type Result struct {
	Text  string   `json:"text"`
	Error string   `json:"error"`
	Tags  []string `json:"tags"`
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	results := []Result{}
	for _, c := range cases {
		results = append(results, run(c))
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(results); err != nil {
		panic(err)
	}
}

func run(c Case) Result {
	t, err := template.New("").Option("missingkey=zero").Parse(c.Template)
	if err != nil {
		return Result{Error: err.Error()}
	}
	system := []string{}
	for _, m := range c.Messages {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
	}
	var text strings.Builder
	err = t.Execute(&text, map[string]any{
		"System":     strings.Join(system, "\n\n"),
		"Messages":   c.Messages,
		"Response":   "",
		"Think":      c.Think != nil && *c.Think,
		"IsThinkSet": c.Think != nil,
	})
	if err != nil {
		return Result{Error: err.Error()}
	}
	return Result{Text: text.String(), Tags: tags(t.Tree.Root)}
}

// The texts around .Thinking, by which Ollama tells thoughts from the answer: the first and the
// last node of the list that it stands in.
func tags(list *parse.ListNode) []string {
	for _, node := range list.Nodes {
		switch x := node.(type) {
		case *parse.ActionNode:
			if x.String() == "{{.Thinking}}" {
				return []string{trimmed(list.Nodes[0]), trimmed(list.Nodes[len(list.Nodes)-1])}
			}
		case *parse.IfNode:
			if found := inBranches(&x.BranchNode); found != nil {
				return found
			}
		case *parse.RangeNode:
			if found := inBranches(&x.BranchNode); found != nil {
				return found
			}
		}
	}
	return nil
}

func inBranches(branch *parse.BranchNode) []string {
	if found := tags(branch.List); found != nil || branch.ElseList == nil {
		return found
	}
	return tags(branch.ElseList)
}

func trimmed(node parse.Node) string {
	if text, ok := node.(*parse.TextNode); ok {
		return strings.TrimSpace(string(text.Text))
	}
	return ""
}
